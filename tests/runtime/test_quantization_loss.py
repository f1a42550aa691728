"""walk() computes what a session computes, and the verdict finds what was broken and where."""

import json
import math
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from compiling.compile_model import compile_model
from models_for_tests import LIMITS, make_config, on_cpu, random_prompts, set_random_weights

from tensorrt_llm import Engine
from tensorrt_llm.models import QWenForCausalLM, quantize_model
from tensorrt_llm.parameter import Parameter
from tensorrt_llm.quantization import QuantizedWeight, QuantMode, quantize_weight
from tensorrt_llm.quantization.layers import WeightOnlyMatmul
from tensorrt_llm.runtime import SamplingConfig
from tensorrt_llm.runtime.quantization_loss import measure_loss
from tensorrt_llm.runtime.walk import walk
from tensorrt_llm.verdict import Gate, Verdict, default_gate

CPU = torch.device("cpu")
CONFIG = make_config(
    vocab_size=61, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=4, head_size=16,
    mlp_hidden_size=96,
)  # fmt: skip
TEXTS = random_prompts([33, 2, 50], CONFIG.vocab_size, seed=3)
INT8 = QuantMode.use_weight_only()
Spoil = Callable[[str, QuantizedWeight], QuantizedWeight]


def plain_engine(dtype: str = "float32") -> Engine:
    model = QWenForCausalLM(CONFIG, dtype)
    set_random_weights(model)
    return compile_model(model, LIMITS)


def quantized_engine(mode: QuantMode = INT8, spoil: Spoil = lambda _, weight: weight) -> Engine:
    """The same weights, quantized, and then perhaps spoilt."""
    float_weights = dict(plain_engine().weights.items())
    model = quantize_model(QWenForCausalLM(CONFIG, "float32"), mode)
    for name, parameter in model.named_parameters():
        if name in float_weights and parameter.dtype == "float32":
            parameter.value = float_weights[name]
    for path, module in model.named_modules():
        if isinstance(module, WeightOnlyMatmul):
            quantized = quantize_weight(float_weights[f"{path}.weight"], module.bits)
            module.set_loader(lambda path=path, quantized=quantized: spoil(path, quantized))
    return compile_model(model, LIMITS)


def verdict_of(quantized: Engine, unquantized: Engine | None = None, **options: Any) -> Verdict:
    names = {"text_name": "random ids", "reference_name": "itself unquantized", "gate": default_gate(INT8)}
    return measure_loss(quantized, unquantized or plain_engine(), TEXTS, CPU, **names, **options)


@pytest.mark.parametrize("mode", [QuantMode(0), QuantMode.INT8_KV_CACHE])
def test_a_walk_makes_the_logits_of_a_session(mode: QuantMode) -> None:
    engine = quantized_engine(mode) if mode else plain_engine()
    sampling = SamplingConfig(max_new_tokens=1, gather_context_logits=True, return_dict=True)
    expected = torch.cat(on_cpu(engine).decode_batch(TEXTS, sampling)["context_logits"])
    *_, last = walk(engine, TEXTS, CPU, logits_of=len(TEXTS))
    torch.testing.assert_close(last.results[0][:, : CONFIG.vocab_size], expected, rtol=0, atol=1e-5)


def test_between_two_visits_the_mode_of_the_caller_holds() -> None:
    visits = walk(plain_engine(), TEXTS, CPU)
    assert next(visits).results and not torch.is_inference_mode_enabled()


def test_writing_into_a_result_changes_what_follows() -> None:
    def logits(change: bool) -> torch.Tensor:
        for visit in walk(plain_engine(), TEXTS, CPU, logits_of=1):
            if change and visit.node.op == "gpt_attention":
                visit.results[0].zero_()
        return visit.results[0]

    assert not torch.equal(logits(change=False), logits(change=True))


def test_a_walk_holds_the_weights_of_one_node(monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight that was read is gone when the node after its own is reached."""
    alive: list[weakref.ref[torch.Tensor]] = []
    largest = 0
    load = Parameter.load

    def counted(parameter: Parameter) -> torch.Tensor:
        loaded = load(parameter).clone()
        alive.append(weakref.ref(loaded))
        return loaded

    monkeypatch.setattr(Parameter, "load", counted)
    for _ in walk(plain_engine(), TEXTS, CPU):
        largest = max(largest, sum(ref() is not None for ref in alive))
    assert len(alive) == 3 + 8 * CONFIG.num_hidden_layers and largest <= 4


def test_an_engine_beside_itself_loses_nothing() -> None:
    verdict = verdict_of(plain_engine())
    assert verdict.mean_kl == 0 and verdict.top1_agreement == 1 and verdict.perplexity == verdict.unquantized_perplexity
    assert verdict.num_tokens == sum(map(len, TEXTS)) - len(TEXTS) and verdict.passes


def test_the_numbers_are_those_of_both_sessions_logits() -> None:
    quantized = quantized_engine(QuantMode.use_weight_only(True))
    verdict = verdict_of(quantized)
    sampling = SamplingConfig(max_new_tokens=1, gather_context_logits=True, return_dict=True)
    p, q = (
        torch.cat([rows[:-1] for rows in on_cpu(engine).decode_batch(TEXTS, sampling)["context_logits"]])
        .double()
        .log_softmax(-1)
        for engine in (plain_engine(), quantized)
    )
    targets = torch.tensor([token for text in TEXTS for token in text[1:]])
    kl = torch.nn.functional.kl_div(q, p, log_target=True, reduction="batchmean")
    assert math.isclose(verdict.mean_kl, kl, rel_tol=1e-4)
    assert math.isclose(verdict.top1_agreement, (p.argmax(-1) == q.argmax(-1)).double().mean(), rel_tol=1e-9)
    assert math.isclose(math.log(verdict.perplexity), torch.nn.functional.nll_loss(q, targets), rel_tol=1e-5)
    assert math.isclose(
        math.log(verdict.unquantized_perplexity), torch.nn.functional.nll_loss(p, targets), rel_tol=1e-5
    )


@pytest.mark.parametrize("broken", ["layers.0.mlp.proj", "layers.1.attention.qkv", "layers.2.attention.dense"])
def test_scales_in_the_wrong_order_fail_the_gate_and_name_their_layer(broken: str) -> None:
    def permute_scales(path: str, weight: QuantizedWeight) -> QuantizedWeight:
        order = torch.randperm(len(weight.scale), generator=torch.Generator().manual_seed(0))
        return replace(weight, scale=weight.scale[order] if path == broken else weight.scale)

    assert verdict_of(quantized_engine()).passes
    verdict = verdict_of(quantized_engine(spoil=permute_scales))
    assert not verdict.passes and verdict.worst_layers[0].layer == broken.rpartition(".")[0]
    # What follows read the unquantized network's results: its own errors are those of a sound quantization.
    assert all(layer.relative_error < 0.1 for layer in verdict.worst_layers[1:])


def test_what_is_not_a_number_fails() -> None:
    def spoil(path: str, weight: QuantizedWeight) -> QuantizedWeight:
        return replace(weight, scale=weight.scale * 1e38) if path == "layers.1.mlp.fc" else weight

    verdict = verdict_of(quantized_engine(spoil=spoil))
    assert not verdict.passes and verdict.worst_layers[0].layer == "layers.1.mlp"


def test_an_unquantized_network_that_overflows_is_named() -> None:
    model = QWenForCausalLM(CONFIG, "float16")
    set_random_weights(model)
    model.layers[1].mlp.proj.weight.value = torch.full((64, 96), 6e4)
    overflowing = compile_model(model, LIMITS)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp: the unquantized network makes infinite .* float16"):
        verdict_of(quantized_engine(), overflowing)


def test_a_verdict_survives_its_json() -> None:
    verdict = verdict_of(quantized_engine(), loss_is_allowed=True)
    assert Verdict.from_dict(json.loads(json.dumps(verdict.to_dict()))) == verdict


@pytest.mark.parametrize(
    ("field", "value"),
    [("mean_kl", "0"), ("mean_kl", -1.0), ("num_tokens", 1.5), ("worst_layers", []), ("gate", {}), ("text", None)],
)
def test_a_forged_verdict_is_refused(field: str, value: Any) -> None:
    data = verdict_of(quantized_engine()).to_dict()
    with pytest.raises(ValueError, match="verdict"):
        Verdict.from_dict(data | {field: value})


def test_nan_never_passes_a_gate() -> None:
    verdict = verdict_of(quantized_engine())
    assert verdict.passes and not replace(verdict, mean_kl=math.nan).passes
    assert not replace(verdict, gate=Gate(mean_kl=0.0, layer_error=1.0)).passes
