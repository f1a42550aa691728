"""The CPU kernels in C; everything else about the package stands in pyproject.toml.

Optional: without a compiler, Python's headers or an x86-64 processor the package installs all the same, and runs the
kernels of torch.
"""

from pathlib import Path

from setuptools import Extension, setup

SOURCES = Path("tensorrt_llm/kernels/cpu/native")

setup(
    ext_modules=[
        Extension(
            "tensorrt_llm.kernels.cpu.native.compiled",
            sources=sorted(map(str, SOURCES.glob("*.c"))),
            depends=sorted(map(str, SOURCES.glob("*.h"))),
            # Sums must be the same wherever they are written: the compiler may not fuse what is not fused here.
            extra_compile_args=["-O3", "-std=c11", "-D_GNU_SOURCE", "-ffp-contract=off", "-pthread"],
            extra_link_args=["-pthread"],
            optional=True,
        )
    ]
)
