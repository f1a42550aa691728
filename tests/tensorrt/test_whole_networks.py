"""Networks of every supported mode, lowered through the strict fake and executed by the interpreter of its layers.

The logits of a prefill of three lengths and of 16 decodes, caches carried over, are those of the reference kernels in
the same dtype. What differs is where a few values are rounded (lowering.py): float32 knows no such difference.
"""

from pathlib import Path
from typing import Any

import interpreter
import pytest
import torch
from checkpoints import write_qwen1_checkpoint, write_qwen2_checkpoint
from compiling.compile_model import compile_model
from fake_tensorrt import make_tensorrt
from interpreter import interpret, interpret_ranks
from lowered_networks import (
    ACTIVATION_STEP,
    ARCHITECTURES,
    LIMITS,
    MODES,
    Step,
    empty_caches,
    engine_of,
    lowered_logits,
    padded_inputs,
    reference_logits,
    relative_errors,
    steps,
)
from weight import load_from_hf_qwen

from tensorrt_llm import Engine, Mapping
from tensorrt_llm.kernels import quantized_reference
from tensorrt_llm.models import QWenConfig, QWenForCausalLM
from tensorrt_llm.tensorrt_backend import building
from tensorrt_llm.tensorrt_backend.building import build_plan
from tensorrt_llm.tensorrt_backend.graph import Graph
from tensorrt_llm.tensorrt_backend.lowering import lower
from tensorrt_llm.tensorrt_backend.shapes import Shapes

# Half a unit in the last place is 2^-11 of float16 and 2^-8 of bfloat16. A logit is the end of some ten roundings in
# each of two layers, of which most add up as random errors do: four units hold them.
TOLERANCES = {"float32": 1e-5, "float16": 8 * 2**-11, "bfloat16": 8 * 2**-8}


# INT8 activations that lie by a half step and go to the other side: a share of what a unit is of a step of 127.
_MOST_DIFFERING = {"float32": 1e-3, "float16": 0.05, "bfloat16": 0.3}


def assert_close(errors: torch.Tensor, dtype: str, mode: str) -> None:
    if mode != "smooth-quant":
        assert errors.max() <= TOLERANCES[dtype]
        return
    # A sum in another order may carry an INT8 activation over to the next step: in float32 one of 100,000, whose row
    # and those after it are then off by part of a step.
    assert errors.max() <= TOLERANCES[dtype] + 2 * ACTIVATION_STEP
    if dtype == "float32":
        assert errors.median() <= TOLERANCES[dtype]


def lowered(engine: Engine) -> tuple[Any, Graph]:
    """The filled network, and what keeps its weights alive."""
    trt = make_tensorrt()
    network = trt.Builder(trt.Logger(trt.Logger.WARNING)).create_network(0)
    return network, lower(engine.plan, engine.weights, network, trt, Shapes.of(engine.config).cache_length)


def errors_of(engine: Engine) -> torch.Tensor:
    given = steps(engine.config.vocab_size)
    network, graph = lowered(engine)
    found = lowered_logits(engine, given, lambda feeds: interpret(network, feeds))
    del graph
    return relative_errors(found, reference_logits(engine, given))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("architecture", ["qwen1", "qwen2-gqa"])
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_logits_are_those_of_the_reference(dtype: str, architecture: str, mode: str) -> None:
    assert_close(errors_of(engine_of(architecture, dtype, mode)), dtype, mode)


@pytest.mark.parametrize("architecture", ["qwen1", "qwen2-gqa"])
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_logits_of_smooth_quant_follow_from_its_integers(
    dtype: str, architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the reference's INT8 activations the logits are close as in any other mode.

    Where the network's own differ, the number that was rounded lies by a half step, as close as its error is large.
    """
    engine = engine_of(architecture, dtype, "smooth-quant")
    given = steps(engine.config.vocab_size)
    integers: list[torch.Tensor] = []
    quantize, execute = quantized_reference.quantize_tensor, interpreter.EXECUTE["IQuantizeLayer"]

    def recorded(*operands: torch.Tensor) -> torch.Tensor:
        integers.append(quantize(*operands))
        return integers[-1]

    monkeypatch.setattr(quantized_reference, "quantize_tensor", recorded)
    expected = reference_logits(engine, given)
    rows: list[int] = []  # of the step's tokens among the padded ones
    counts = [0, 0]  # integers that differ, and all

    def replaced(layer: Any, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        own, wanted = execute(layer, x, scale), integers.pop(0)
        exact = (x.double() / scale.double())[rows]
        differing = own[rows] != wanted
        assert ((exact - exact.floor() - 0.5).abs()[differing] <= 127 * TOLERANCES[dtype]).all()
        counts[0] += int(differing.sum())
        counts[1] += differing.numel()
        own[rows] = wanted
        return own

    monkeypatch.setitem(interpreter.EXECUTE, "IQuantizeLayer", replaced)
    network, graph = lowered(engine)
    caches = empty_caches(engine, len(given[0].ids))
    found = []
    for step in given:
        length = max(map(len, step.ids))
        rows[:] = [row * length + place for row, ids in enumerate(step.ids) for place in range(len(ids))]
        found.append(interpret(network, padded_inputs(engine, step) | caches)["logits"])
    del graph
    assert not integers, "every activation was quantized once"
    assert counts[0] <= _MOST_DIFFERING[dtype] * counts[1]
    assert relative_errors(found, expected).max() <= TOLERANCES[dtype]


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES.keys() - {"qwen1", "qwen2-gqa"}))
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_logits_of_other_architectures_are_those_of_the_reference(dtype: str, architecture: str) -> None:
    assert_close(errors_of(engine_of(architecture, dtype, "float")), dtype, "float")


@pytest.mark.parametrize("mode", sorted(MODES.keys() - {"float"}))
def test_a_mode_changes_the_logits_by_more_than_its_tolerance(mode: str) -> None:
    """The comparisons above mean something."""
    given = steps(97)
    plain, quantized = (reference_logits(engine_of("qwen1", "float32", each), given) for each in ("float", mode))
    assert relative_errors(quantized, plain).min() > 100 * TOLERANCES["float32"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_every_value_has_the_dtype_and_the_columns_that_our_network_says(dtype: str, mode: str) -> None:
    engine = engine_of("qwen1", dtype, mode)
    network, graph = lowered(engine)
    tensors = {output.name: output for layer in network.recorded_layers for output in layer.recorded_outputs}
    for node in engine.plan.nodes:
        (spec,) = node.outputs
        name = next((outside for outside, value in engine.plan.outputs.items() if value == spec.name), spec.name)
        assert graph.dtype_of(tensors[name]) == spec.dtype
        assert len(tensors[name].shape) == 2 and tensors[name].shape[1] == spec.shape[1], spec


def test_names_of_layers_are_those_of_our_nodes() -> None:
    engine = engine_of("qwen1", "float16", "float")
    network, _ = lowered(engine)
    names = [layer.name for layer in network.recorded_layers]
    assert len(set(names)) == len(names)
    ours = {node.outputs[0].name for node in engine.plan.nodes} | {spec.name for spec in engine.plan.weights}
    assert ours <= {name.partition(":")[0] for name in names}


def test_a_weight_is_read_once_and_not_copied() -> None:
    engine = engine_of("qwen2-mha-tied", "float16", "float")
    read: list[str] = []
    held: list[torch.Tensor] = []

    class Watched(dict[str, torch.Tensor]):
        def __getitem__(self, name: str) -> torch.Tensor:
            read.append(name)
            held.append(engine.weights[name])
            return held[-1]

    trt = make_tensorrt()
    network = trt.Builder(trt.Logger(trt.Logger.WARNING)).create_network(0)
    graph = lower(engine.plan, Watched(), network, trt, 64)
    assert sorted(read) == sorted(spec.name for spec in engine.plan.weights)
    kept = {tensor.data_ptr() for tensor in graph.kept}
    assert all(tensor.data_ptr() in kept for tensor in held)


# Tensor parallel


@pytest.mark.parametrize("generation", ["qwen1", "qwen2"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_two_ranks_give_the_logits_of_one(dtype: str, generation: str, tmp_path: Path) -> None:
    assert_close(ranks_errors(tmp_path, dtype, generation), dtype, "float")


def ranks_errors(folder: Path, dtype: str, generation: str = "qwen1") -> torch.Tensor:
    """Of two ranks together against one that has all."""
    ranks = rank_engines(folder, dtype, generation)
    given = steps(97)
    found = [logits[:, :97] for logits in logits_of_ranks(ranks, given)]
    return relative_errors(found, reference_logits(rank_of(folder, dtype, Mapping()), given))


def logits_of_ranks(ranks: list[Engine], given: list[Step]) -> list[torch.Tensor]:
    """Of the first rank, to which the others have given their columns; the ranks run in step."""
    networks, graphs = zip(*map(lowered, ranks), strict=True)
    caches = [empty_caches(engine, len(given[0].ids)) for engine in ranks]
    found = []
    for step in given:
        feeds = [padded_inputs(engine, step) | own for engine, own in zip(ranks, caches, strict=True)]
        first, second = (outputs["logits"] for outputs in interpret_ranks(networks, feeds))
        assert torch.equal(first, second)
        found.append(first)
    del graphs
    return found


def rank_engines(folder: Path, dtype: str, generation: str = "qwen1") -> list[Engine]:
    """The parts of a checkpoint that is written into `folder`."""
    shape: dict[str, Any] = {"hidden": 64, "heads": 4, "mlp_width": 96, "vocab": 97}  # odd, so lm_head is padded
    if generation == "qwen1":
        write_qwen1_checkpoint(folder, seq_length=8, **shape)
    else:
        write_qwen2_checkpoint(folder, num_kv_heads=2, **shape)
    return [rank_of(folder, dtype, Mapping(world_size=2, tp_size=2, rank=rank)) for rank in range(2)]


def rank_of(checkpoint: Path, dtype: str, mapping: Mapping) -> Engine:
    config = QWenConfig.from_hf_dir(checkpoint)
    model = QWenForCausalLM(config, dtype, mapping)
    load_from_hf_qwen(model, checkpoint, config, mapping)
    return compile_model(model, LIMITS, fuse=False)


# Plans


def test_known_defects_are_kept_away_from_by_defaults() -> None:
    engine = engine_of("qwen1", "float16", "float")
    network, _ = lowered(engine)
    layers = [layer for layer in network.recorded_layers if layer.recorded_kind == "IAttention"]
    assert len(layers) == engine.config.num_layers
    assert all(layer.decomposable and layer.mask.dtype.name == "BOOL" for layer in layers)
    trt = make_tensorrt()
    builder = trt.Builder(trt.Logger(trt.Logger.WARNING))
    config = building._builder_config(engine, Shapes.of(engine.config), builder, trt)
    assert config.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE) >= 8 << 30
    assert not config.get_flag(trt.BuilderFlag.TF32)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("architecture", ["qwen1", "qwen2-gqa"])
def test_a_plan_is_built_with_two_profiles(architecture: str, mode: str, tmp_path: Path) -> None:
    """The fake checks what can be checked of a finished network and its profiles."""
    trt = make_tensorrt()
    built = build_plan(engine_of(architecture, "float16", mode), trt, tmp_path)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".json", ".plan"]
    runtime = trt.Runtime(trt.Logger(trt.Logger.WARNING))
    plan = runtime.deserialize_cuda_engine(built.read_plan())
    assert plan.num_optimization_profiles == 2
