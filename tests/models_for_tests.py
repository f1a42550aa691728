"""Small models in all stages: config, network, engine, session. Weights are random and seeded; any test may use it."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from compiling.compile_model import compile_model
from weight import load_from_hf_qwen

from tensorrt_llm import Engine, Limits, Mapping, Module, Network, net_guard
from tensorrt_llm.models import QWenConfig, QWenForCausalLM
from tensorrt_llm.passes import optimize
from tensorrt_llm.runtime import GenerationSession, Session

LIMITS = Limits(max_batch_size=8, max_input_len=128, max_output_len=96, max_num_tokens=64, tokens_per_block=16)


def make_config(**changes: Any) -> QWenConfig:
    """A Qwen-1 of one layer, or what `changes` make of it."""
    facts: dict[str, Any] = {
        "architecture": "QWenLMHeadModel",
        "vocab_size": 11,
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_size": 4,
        "mlp_hidden_size": 6,
        "norm_epsilon": 1e-6,
        "rotary_base": 10000.0,
        "seq_length": 64,
        "max_position_embeddings": 64,
        "use_dynamic_ntk": True,
        "use_logn_attn": True,
        "tie_word_embeddings": False,
    }
    return QWenConfig(**facts | changes)


def set_random_weights(model: Module, seed: int = 0) -> None:
    """Data in float32 for every parameter, of a scale that keeps activations as large as they are."""
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.value = noise / parameter.shape[1] ** 0.5 if noise.dim() == 2 else 1 + 0.2 * noise


def describe(model: QWenForCausalLM, tokens_per_block: int = LIMITS.tokens_per_block) -> Network:
    """The network of `model`, before any pass."""
    network = Network()
    network.set_named_parameters(model.named_parameters())
    with net_guard(network):
        model(**model.prepare_inputs(tokens_per_block))
    return network


def describe_config(config: QWenConfig, dtype: str = "float32", *, optimized: bool = False) -> Network:
    network = describe(QWenForCausalLM(config, dtype))
    if optimized:
        optimize(network)
    return network


def make_engine(config: QWenConfig | None = None, dtype: str = "float32", limits: Limits = LIMITS) -> Engine:
    """An engine in memory with random weights."""
    model = QWenForCausalLM(config or make_config(), dtype)
    set_random_weights(model)
    return compile_model(model, limits)


def engine_from_checkpoint(path: Path, dtype: str = "float32", limits: Limits = LIMITS) -> Engine:
    """An engine in memory whose weights lie in the checkpoint."""
    config = QWenConfig.from_hf_dir(path)
    model = QWenForCausalLM(config, dtype)
    load_from_hf_qwen(model, path, config, Mapping())
    return compile_model(model, limits)


def on_cpu(engine: Engine, kv_cache_tokens: int = 2048, **options: Any) -> GenerationSession:
    return GenerationSession(Session(engine, "cpu", kv_cache_tokens=kv_cache_tokens, **options))


def random_prompts(lengths: Iterable[int], vocab_size: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocab_size, (length,), generator=generator).tolist() for length in lengths]
