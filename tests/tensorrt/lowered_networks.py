"""Small Qwen networks of every mode, run by our reference kernels, and lowered, by the interpreter.

Both sides get the same steps: prompts of several lengths as one batch, then decodes, with the caches carried over.
"""

import math
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from compiling.compile_model import compile_model
from models_for_tests import make_config

from tensorrt_llm import Engine, Limits, Module
from tensorrt_llm.dtype import torch_dtype
from tensorrt_llm.kernels import StepShape, reference_kernels
from tensorrt_llm.models import QWenConfig, QWenForCausalLM, quantize_model
from tensorrt_llm.quantization import QuantMode
from tensorrt_llm.runtime.executor import Executor
from tensorrt_llm.tensorrt_backend.shapes import Shapes, cache_names

LIMITS = Limits(max_batch_size=3, max_input_len=24, max_output_len=40, max_num_tokens=24, tokens_per_block=64)
PROMPT_LENGTHS = (5, 20, 11)
NUM_DECODES = 16
# Of INT8 activations, which are about one.
ACTIVATION_STEP = 3 / 127

_SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_size": 32,
    "mlp_hidden_size": 256,
}
_QWEN2 = {"architecture": "Qwen2ForCausalLM", "rotary_base": 1e6, "use_dynamic_ntk": False, "use_logn_attn": False}
# A trained length of 8 tokens, so that the prompts lie in three steps of NTK, and most positions in log-n's reach.
ARCHITECTURES: dict[str, QWenConfig] = {
    "qwen1": make_config(**_SIZES, seq_length=8),
    "qwen1-plain": make_config(**_SIZES, seq_length=8, use_dynamic_ntk=False, use_logn_attn=False),
    "qwen1-ntk": make_config(**_SIZES, seq_length=8, use_logn_attn=False),
    "qwen1-within-trained-length": make_config(**_SIZES, seq_length=64),
    "qwen1-logn": make_config(**_SIZES, seq_length=8, use_dynamic_ntk=False),
    "qwen2-mha-tied": make_config(**_SIZES | _QWEN2 | {"tie_word_embeddings": True}),
    "qwen2-gqa": make_config(**_SIZES | _QWEN2 | {"num_key_value_heads": 2}),
    "qwen2-mqa": make_config(**_SIZES | _QWEN2 | {"num_key_value_heads": 1, "head_size": 16}),
}
# Quantization: the mode, and what quantize_model takes besides.
MODES: dict[str, tuple[QuantMode, dict[str, Any]]] = {
    "float": (QuantMode(0), {}),
    "int8": (QuantMode.use_weight_only(), {}),
    "int8-lm-head": (QuantMode.use_weight_only(), {"quantize_lm_head": True}),
    "int4": (QuantMode.use_weight_only(True), {}),
    "int4-g128": (QuantMode.use_weight_only(True, True), {"group_size": 128}),
    "int4-g32": (QuantMode.use_weight_only(True, True), {"group_size": 32}),
    "int4-gptq-act-order": (QuantMode.use_weight_only(True, True), {"group_size": 64, "act_order": True}),
    "int4-awq-symmetric": (QuantMode.use_weight_only(True, True), {"group_size": 128, "pre_quant_scale": True}),
    "smooth-quant": (QuantMode.use_smooth_quant(per_channel=True), {}),
}


def engine_of(architecture: str, dtype: str, mode: str) -> Engine:
    """Unfused, as the lowering wants it."""
    quant_mode, options = MODES[mode]
    model = quantize_model(QWenForCausalLM(ARCHITECTURES[architecture], dtype), quant_mode, **options)
    set_weights(model)
    return compile_model(model, LIMITS, fuse=False)


def set_weights(model: Module) -> None:
    """Data for every parameter, quantized or not, of a scale that keeps activations as large as they are."""
    for name, parameter in model.named_parameters():
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        parameter.value = _data(name, parameter.shape, parameter.dtype, generator)


def _data(name: str, shape: tuple[int, ...], dtype: str, generator: torch.Generator) -> torch.Tensor:
    kind = name.rpartition(".")[2]
    if kind == "order":
        return torch.randperm(shape[0], generator=generator).int()
    if dtype in ("int8", "uint8"):
        low, high = (-127, 128) if dtype == "int8" else (0, 256)
        return torch.randint(low, high, shape, generator=generator).to(torch_dtype(dtype))
    noise = torch.randn(shape, generator=generator)
    if (
        kind == "scale"
    ):  # over the root of 128 to 256 columns; uniform integers of 8 bits deviate by 73, of 4 bits by 4.6
        return _steps(noise) / (12 * 73 if shape[1] == 1 else 12 * 4.6)
    if kind == "per_channel_scale":
        return _steps(noise) / (12 * 73)
    if kind == "act_scale":
        return torch.full(shape, ACTIVATION_STEP)  # some activations are cut
    if kind == "smoother":
        return _steps(noise)
    return noise / math.sqrt(shape[1]) if len(shape) == 2 else 1 + 0.2 * noise


def _steps(noise: torch.Tensor) -> torch.Tensor:
    """Positive, around one."""
    return 1 + 0.3 * noise.tanh()


@dataclass(frozen=True)
class Step:
    """New tokens of a batch: ids, how many each sequence has in the cache, and how long its prompt is."""

    ids: list[list[int]]
    starts: list[int]
    context_lengths: list[int]


def steps(vocab_size: int, lengths: Iterable[int] = PROMPT_LENGTHS, num_decodes: int = NUM_DECODES) -> list[Step]:
    """A prefill and then decodes, their tokens chosen before."""
    lengths = list(lengths)
    generator = torch.Generator().manual_seed(1)

    def draw(count: int) -> list[int]:
        return torch.randint(vocab_size, (count,), generator=generator).tolist()

    prefill = Step([draw(length) for length in lengths], [0] * len(lengths), lengths)
    decodes = [
        Step([draw(1) for _ in lengths], [length + index for length in lengths], lengths)
        for index in range(num_decodes)
    ]
    return [prefill, *decodes]


def reference_logits(engine: Engine, given: list[Step]) -> list[torch.Tensor]:
    """The last token's logits [sequences, vocab] of each step, by the reference kernels: packed, and paged."""
    executor = Executor(engine.plan, engine.weights, reference_kernels(), torch.device("cpu"))
    config, batch_size = engine.config, len(given[0].ids)
    pool = (batch_size, 2, config.num_kv_heads_per_rank, LIMITS.tokens_per_block, config.head_size)
    dtype = torch_dtype(config.precision)
    pools = {f"past_key_value_{layer}": torch.zeros(pool, dtype=dtype) for layer in range(config.num_layers)}
    return [executor.run(packed_inputs(step) | pools, _shape_of(step))["logits"] for step in given]


def packed_inputs(step: Step) -> dict[str, torch.Tensor]:
    lengths = torch.tensor([len(ids) for ids in step.ids])
    starts = torch.tensor(step.starts)
    ends = lengths.cumsum(0)
    numbers = {
        "input_ids": torch.tensor([token for ids in step.ids for token in ids]),
        "position_ids": torch.cat(
            [torch.arange(int(start), int(start + length)) for start, length in zip(starts, lengths, strict=True)]
        ),
        "query_starts": torch.cat([torch.zeros(1), ends]),
        "sequence_length": starts + lengths,
        "context_lengths": torch.tensor(step.context_lengths),
        "block_tables": torch.arange(len(step.ids))[:, None],
        "last_token_ids": ends - 1,
    }
    return {name: tensor.int() for name, tensor in numbers.items()}


def _shape_of(step: Step) -> StepShape:
    lengths = [len(ids) for ids in step.ids]
    longest = max(start + length for start, length in zip(step.starts, lengths, strict=True))
    return StepShape(sum(lengths), len(lengths), len(lengths), sum(lengths), max(lengths), longest)


def empty_caches(engine: Engine, batch_size: int) -> dict[str, torch.Tensor]:
    """Not zeros: what nobody wrote must not be read."""
    config = engine.config
    shape = (batch_size, config.num_kv_heads_per_rank, Shapes.of(config).cache_length, config.head_size)
    dtype = torch_dtype(config.precision)
    return {f"past_{name}": torch.full(shape, 100.0, dtype=dtype) for name in cache_names(config)}


def padded_inputs(engine: Engine, step: Step) -> dict[str, torch.Tensor]:
    """A step as the lowered network takes it: padded on the right."""
    length = max(map(len, step.ids))
    starts = torch.tensor(step.starts)
    numbers = {
        "input_ids": torch.tensor([ids + [0] * (length - len(ids)) for ids in step.ids]),
        "position_ids": starts[:, None] + torch.arange(length),
        "kv_write_indices": starts,
        "last_token_ids": torch.tensor([row * length + len(ids) - 1 for row, ids in enumerate(step.ids)]),
    }
    if "context_lengths" in Shapes.of(engine.config).inputs(engine.config, 1, 1, 1):
        numbers["context_lengths"] = torch.tensor(step.context_lengths)
    return {name: tensor.int() for name, tensor in numbers.items()}


def lowered_logits(
    engine: Engine, given: list[Step], run: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
) -> list[torch.Tensor]:
    """The same by `run`, which executes the lowered network on feeds and writes into its caches."""
    caches = empty_caches(engine, len(given[0].ids))
    return [run(padded_inputs(engine, step) | caches)["logits"] for step in given]


def relative_errors(found: list[torch.Tensor], expected: list[torch.Tensor]) -> torch.Tensor:
    """The largest difference of each row of each step beside the largest logit; inf for what is no number."""
    pairs = zip(found, expected, strict=True)
    errors = torch.stack([(ours.float() - wanted).abs().amax(1) / wanted.abs().max() for ours, wanted in pairs])
    return errors.where(errors.isfinite(), torch.inf)
