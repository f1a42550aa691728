"""From an engine in memory, its weights still in their files, to a plan of TensorRT on disk.

TensorRT itself chooses kernels and times them on the GPU of this machine, so a plan is for GPUs of that kind. All
weights are in host memory while it does.
"""

import hashlib
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..engine import Engine, EngineConfig
from .lowering import lower
from .plan_file import TensorRtEngine, save
from .shapes import Shapes

logger = logging.getLogger(__name__)

# With 1 GB a cache of 40,000 tokens could not be built: attention that is taken apart needs 2.6 GB (docs/tensorrt.md).
_WORKSPACE_BYTES = 8 << 30


def build_plan(engine: Engine, trt: Any, folder: Path) -> TensorRtEngine:
    """Lower the unfused `engine`, let TensorRT build it, and write it into `folder`."""
    shapes = Shapes.of(engine.config)
    trt_logger = trt.Logger(trt.Logger.WARNING)
    builder = trt.Builder(trt_logger)
    network = builder.create_network(0)
    graph = lower(engine.plan, engine.weights, network, trt, shapes.cache_length)
    logger.info("lowered %d nodes to %d layers", len(engine.plan.nodes), network.num_layers)
    serialized = builder.build_serialized_network(network, _builder_config(engine, shapes, builder, trt))
    del graph  # what TensorRT read from until now
    if serialized is None:
        raise ValueError(
            f"TensorRT {trt.__version__} could not build {engine.config.engine_name}; its own log above says why"
        )
    built = TensorRtEngine(
        config=_with_slots_as_blocks(engine.config),
        plan=engine.plan,
        shapes=shapes,
        tensorrt_version=str(trt.__version__),
        plan_sha256=hashlib.sha256(serialized).hexdigest(),
        path=(folder / engine.config.engine_name).with_suffix(".plan"),
    )
    save(built, serialized)
    return built


def _with_slots_as_blocks(config: EngineConfig) -> EngineConfig:
    """A sequence's cache is one block to the scheduler, whose blocks are powers of two."""
    limits = config.limits
    return replace(config, limits=replace(limits, tokens_per_block=1 << (limits.max_seq_len - 1).bit_length()))


def _builder_config(engine: Engine, shapes: Shapes, builder: Any, trt: Any) -> Any:
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, _WORKSPACE_BYTES)
    # On by default; a float32 engine is float32.
    config.clear_flag(trt.BuilderFlag.TF32)
    for ranges in shapes.profiles(engine.config):
        profile = builder.create_optimization_profile()
        for name, (smallest, likely, largest) in ranges.items():
            profile.set_shape(name, smallest, likely, largest)
        if config.add_optimization_profile(profile) < 0:
            raise ValueError(f"TensorRT refuses the optimization profile {ranges}")
    return config
