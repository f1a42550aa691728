"""An engine folder of either backend: what is in it, and a session to run it."""

from pathlib import Path

import torch

from ..engine import Engine
from ..engine_file import EngineFile, read_builder_config
from ..tensorrt_backend.api import import_tensorrt
from ..tensorrt_backend.plan_file import BACKEND, TensorRtEngine
from .session import Session, pick_device, prepare_device
from .tensorrt_session import TensorRtSession

AnyEngine = Engine | TensorRtEngine


def open_engine(
    engine_dir: Path | str, rank: int = 0, *, check_weights: bool = True, opened: EngineFile | None = None
) -> AnyEngine:
    """The engine of `rank` in a folder that build.py wrote, whichever backend it is for; see Engine.from_dir."""
    if read_builder_config(Path(engine_dir)).get("backend") == BACKEND:
        return TensorRtEngine.from_dir(engine_dir, rank)
    return Engine.from_dir(engine_dir, rank, check_weights=check_weights, opened=opened)


def open_session(
    engine: AnyEngine,
    device: torch.device | str | None = None,
    *,
    kv_cache_tokens: int | None = None,
    reference: bool = False,
) -> Session | TensorRtSession:
    """A session for `engine`; a ValueError where this machine lacks what its backend needs."""
    if isinstance(engine, Engine):
        return Session(engine, device, kv_cache_tokens=kv_cache_tokens, reference=reference)
    if reference:
        raise ValueError(f"{engine.path.name} is a TensorRT plan, which only TensorRT runs; build without --backend")
    trt = import_tensorrt()
    return TensorRtSession(engine, trt, _pick_gpu(device, engine), kv_cache_tokens=kv_cache_tokens)


def _pick_gpu(device: torch.device | str | None, engine: TensorRtEngine) -> torch.device:
    picked = device if isinstance(device, torch.device) else pick_device(device)
    if picked.type != "cuda":
        raise ValueError(f"device is {picked.type}, but {engine.path.name} is a TensorRT plan: it needs a CUDA GPU")
    prepare_device(picked)
    return picked
