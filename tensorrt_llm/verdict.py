"""What quantization cost an engine, measured when it was built. Plain numbers, readable without torch."""

import math
from dataclasses import asdict, dataclass, fields
from reprlib import repr as shortened
from typing import Any

from .quantization.mode import QuantMode

_LARGEST_LIST = 64


@dataclass(frozen=True)
class Gate:
    """What a build lets pass."""

    mean_kl: float  # nats per token
    layer_error: float  # of any layer


def default_gate(mode: QuantMode) -> Gate:
    """The gate of a mode, set by judgement: above what a sound quantization cost where it was measured.

    A layer's largest error on the bundled checkpoint: 0.01 for INT8, 0.02 to 0.05 for SmoothQuant, 0.16 for INT4.
    """
    if mode.is_int4_weight_only():
        return Gate(mean_kl=0.1 if mode.has_per_group_scaling() else 0.2, layer_error=0.4)
    if mode.has_act_and_weight_quant():
        return Gate(mean_kl=0.05, layer_error=0.25)
    return Gate(mean_kl=0.02, layer_error=0.1)


@dataclass(frozen=True)
class LayerError:
    """|quantized - unquantized| / |unquantized|, Frobenius norms, of what a layer half makes of the same input."""

    layer: str
    relative_error: float


@dataclass(frozen=True)
class Verdict:
    """A quantized engine beside its unquantized network on the same text; `reference` says whose weights that had."""

    reference: str  # what the quantized engine was compared with
    text: str  # what both read
    num_tokens: int  # whose next-token distributions were compared
    mean_kl: float  # KL(unquantized || quantized) of the next token, nats per token
    top1_agreement: float  # share of tokens of which both name the same next token
    perplexity: float
    unquantized_perplexity: float
    worst_layers: tuple[LayerError, ...]  # largest first
    gate: Gate
    loss_was_allowed: bool  # --allow_accuracy_loss

    @property
    def passes(self) -> bool:
        """Whether the gate holds; what is not a number does not pass."""
        return self.mean_kl <= self.gate.mean_kl and all(
            layer.relative_error <= self.gate.layer_error for layer in self.worst_layers
        )

    def __str__(self) -> str:
        worst = self.worst_layers[0]
        allowed = "" if self.passes else ", WORSE than the gate" + (", allowed" if self.loss_was_allowed else "")
        return (
            f"mean KL {self.mean_kl:.5f} nats (gate {self.gate.mean_kl:g}), top-1 agreement {self.top1_agreement:.2%}, "
            f"perplexity {self.perplexity:.4f} (unquantized {self.unquantized_perplexity:.4f}), worst layer "
            f"{worst.layer} {worst.relative_error:.2%} (gate {self.gate.layer_error:.0%}), on {self.num_tokens} tokens "
            f"of {self.text}, against {self.reference}{allowed}"
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        facts = asdict(self)
        return facts | {"worst_layers": list(facts["worst_layers"])}

    @classmethod
    def from_dict(cls, data: Any) -> "Verdict":
        """Read what `to_dict` wrote; anything of another form is a ValueError."""
        facts = _fields_of(cls, data, "verdict")
        layers = facts["worst_layers"]
        if not isinstance(layers, list) or not 1 <= len(layers) <= _LARGEST_LIST:
            raise ValueError(f"verdict: worst_layers is {shortened(layers)}, expected 1 to {_LARGEST_LIST} layers")
        facts["worst_layers"] = tuple(
            LayerError(**_fields_of(LayerError, layer, f"verdict.worst_layers[{index}]"))
            for index, layer in enumerate(layers)
        )
        facts["gate"] = Gate(**_fields_of(Gate, facts["gate"], "verdict.gate"))
        return cls(**facts)


_KINDS = {"num_tokens": int, "loss_was_allowed": bool, "reference": str, "text": str, "layer": str}


def _fields_of(kind: type, data: Any, where: str) -> dict[str, Any]:
    names = {field.name for field in fields(kind)}
    if not isinstance(data, dict) or set(data) != names:
        raise ValueError(f"{where} is {shortened(data)}, expected exactly {sorted(names)}")
    for name, value in data.items():
        if name in ("worst_layers", "gate"):
            continue
        wanted = _KINDS.get(name, float)
        is_number = wanted is float and isinstance(value, int | float) and not isinstance(value, bool)
        if type(value) is not wanted and not is_number:
            raise ValueError(f"{where}.{name} is {shortened(value)}, expected {wanted.__name__}")
        if wanted is float and value < 0 and not math.isnan(value):
            raise ValueError(f"{where}.{name} is {value!r}, expected a number that is not negative")
    return dict(data)
