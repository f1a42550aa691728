"""NVIDIA's `tensorrt` module, imported when somebody asks for it and not before."""

from typing import Any

# 11.0 brought attention with masks and its own KV lengths, and one way of typing networks.
OLDEST_MAJOR = 11
_INSTALL = "install it with: pip install 'tensorrt_llm[tensorrt]' (or: pip install 'tensorrt>=11')"


def import_tensorrt() -> Any:
    """The module; a ValueError that says what to install if it is missing, cannot be loaded or is too old."""
    try:
        import tensorrt
    except ModuleNotFoundError as error:
        raise ValueError(f"the TensorRT backend needs NVIDIA's tensorrt>={OLDEST_MAJOR}; {_INSTALL}") from error
    except (ImportError, OSError) as error:
        raise ValueError(f"NVIDIA's tensorrt is installed but cannot be loaded ({error}); {_INSTALL}") from error
    # A folder of that name on the path would be imported too, and has no version.
    version = getattr(tensorrt, "__version__", "of no version")
    major = version.partition(".")[0]
    if not major.isdigit() or int(major) < OLDEST_MAJOR:
        raise ValueError(f"tensorrt is {version}, the TensorRT backend needs NVIDIA's >={OLDEST_MAJOR}; {_INSTALL}")
    return tensorrt
