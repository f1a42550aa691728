"""What build.py --backend tensorrt does instead: what it refuses, and plans instead of engine files."""

from pathlib import Path
from typing import Any

import torch

from tensorrt_llm import Engine
from tensorrt_llm.tensorrt_backend.api import import_tensorrt
from tensorrt_llm.tensorrt_backend.building import build_plan
from tensorrt_llm.tensorrt_backend.lowering import check_lowerable

from .args import BuildArgs

# Flags that would have no effect, or another one than they say.
_REFUSED = (
    ("paged_kv_cache", "the cache of TensorRT's own layers is contiguous"),
    ("remove_input_padding", "sequences are padded: packed attention has bugs in TensorRT 11.1 and 11.2"),
    ("use_gpt_attention_plugin", "attention is TensorRT's own layer"),
    ("use_gemm_plugin", "matmuls are TensorRT's own layers"),
    ("batch_invariant", "TensorRT chooses kernels by shape"),
    ("tune", "TensorRT times its kernels while it builds"),
    ("parallel_build", "TensorRT times kernels, so ranks are built one after the other"),
    ("dry_run", "what TensorRT takes is known when it has built"),
)


def check_tensorrt_flags(args: BuildArgs) -> None:
    """A ValueError for the first flag that does not go with the backend."""
    for name, reason in _REFUSED:
        if getattr(args, name):
            raise ValueError(f"--{name} does not go with --backend tensorrt: {reason}; leave it out")


def tensorrt_for_building() -> Any:
    """NVIDIA's module, on a machine where it can build."""
    trt = import_tensorrt()
    if not torch.cuda.is_available():
        raise ValueError(
            "--backend tensorrt needs a CUDA GPU, as TensorRT builds for the one that it finds, and torch finds none; "
            "build on the machine where the engine will run"
        )
    return trt


def check_engines(engines: list[Engine]) -> None:
    """A ValueError for the first op that TensorRT cannot say; no weight is read."""
    for engine in engines:
        check_lowerable(engine.plan)


def save_plans(engines: list[Engine], trt: Any, folder: Path) -> None:
    for engine in engines:
        build_plan(engine, trt, folder)
