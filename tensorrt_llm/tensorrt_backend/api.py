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
    version = str(tensorrt.__version__)
    if not version.partition(".")[0].isdigit() or int(version.partition(".")[0]) < OLDEST_MAJOR:
        raise ValueError(f"tensorrt is {version}, the TensorRT backend needs >={OLDEST_MAJOR}; {_INSTALL}")
    return tensorrt
