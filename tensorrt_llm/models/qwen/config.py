"""What the config.json of a Qwen checkpoint says, checked, in one form for both generations.

Every value read has a type and a range; every option that changes the function has the one value that the model
implements, and anything else is refused by name. Knows nothing of weights, ranks, dtypes or engine limits.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as shortened
from typing import Any

QWEN1, QWEN2 = "QWenLMHeadModel", "Qwen2ForCausalLM"


@dataclass(frozen=True)
class Range:
    """The type of a field and, for numbers, its smallest and largest value."""

    kind: type
    low: float = -math.inf
    high: float = math.inf

    def __str__(self) -> str:
        if self.kind is bool:
            return "true or false"
        return f"{'an integer' if self.kind is int else 'a number'} from {self.low:.10g} to {self.high:.10g}"


# The upper ends are about ten times the largest model known: they stop slips and hostile files, not models.
RANGES = {
    "vocab_size": Range(int, 1, 2**22),
    "hidden_size": Range(int, 1, 2**17),
    "num_hidden_layers": Range(int, 1, 1024),
    "num_attention_heads": Range(int, 1, 1024),
    "num_key_value_heads": Range(int, 1, 1024),
    "head_size": Range(int, 2, 1024),
    "mlp_hidden_size": Range(int, 1, 2**20),
    "norm_epsilon": Range(float, 1e-15, 0.1),
    "rotary_base": Range(float, 1, 1e12),
    "seq_length": Range(int, 2, 2**26),
    "max_position_embeddings": Range(int, 2, 2**26),
    "use_dynamic_ntk": Range(bool),
    "use_logn_attn": Range(bool),
    "tie_word_embeddings": Range(bool),
}

# Field -> the keys of config.json that may hold it. Several present must agree; "a.b" is key b of object a.
# Qwen-1: today's name, then that of the first release. Qwen2: before, then since transformers 5.
KEYS = {
    QWEN1: {
        "vocab_size": ("vocab_size", "padded_vocab_size"),
        "hidden_size": ("hidden_size", "n_embd"),
        "num_hidden_layers": ("num_hidden_layers", "n_layer"),
        "num_attention_heads": ("num_attention_heads", "n_head"),
        "head_size": ("kv_channels",),
        "mlp_hidden_size": ("intermediate_size", "ffn_hidden_size"),  # both branches together; halved below
        "norm_epsilon": ("layer_norm_epsilon",),
        "rotary_base": ("rotary_emb_base",),
        "seq_length": ("seq_length",),
        "max_position_embeddings": ("max_position_embeddings", "n_positions"),
        "use_dynamic_ntk": ("use_dynamic_ntk",),
        "use_logn_attn": ("use_logn_attn",),
        "tie_word_embeddings": ("tie_word_embeddings",),
    },
    QWEN2: {
        "vocab_size": ("vocab_size",),
        "hidden_size": ("hidden_size",),
        "num_hidden_layers": ("num_hidden_layers",),
        "num_attention_heads": ("num_attention_heads",),
        "num_key_value_heads": ("num_key_value_heads",),
        "head_size": ("head_dim",),
        "mlp_hidden_size": ("intermediate_size",),
        "norm_epsilon": ("rms_norm_eps",),
        "rotary_base": ("rope_theta", "rope_parameters.rope_theta", "rope_scaling.rope_theta"),
        "max_position_embeddings": ("max_position_embeddings",),
        "tie_word_embeddings": ("tie_word_embeddings",),
    },
}

# Key -> (the only value that the model implements, what another one would mean). None: the key must be absent or null.
_QUANTIZED = (
    "quantized weights are read by build.py --use_weight_only --weight_only_precision int4_gptq, int8_gptq or int4_awq "
    "with --quant_ckpt_path; give the unquantized checkpoint here"
)
_ROPE = "RoPE scaling is not supported"
EXPECTED: dict[str, dict[str, tuple[Any, str]]] = {
    QWEN1: {
        "model_type": ("qwen", "it contradicts the architecture"),
        "quantization_config.quant_method": (None, _QUANTIZED),
        "quantization_config": (None, _QUANTIZED),
        "visual": (None, "Qwen-VL is not supported"),
        "audio": (None, "Qwen-Audio is not supported"),
        "no_bias": (True, "biases outside c_attn are not supported"),
        "rotary_pct": (1.0, "rotating only a part of a head is not supported"),
        "scale_attn_weights": (True, "unscaled attention is not supported"),
        "pos_emb": ("rotary", "positions other than RoPE are not supported"),
        "activation": ("swiglu", "other activations are not supported"),
        "apply_residual_connection_post_layernorm": (False, "residuals taken after the norm are not supported"),
        "use_cache_quantization": (False, "a quantized KV cache is chosen when building, not in the checkpoint"),
        "rope_scaling": (None, _ROPE),
    },
    QWEN2: {
        "model_type": ("qwen2", "it contradicts the architecture"),
        "quantization_config.quant_method": (None, _QUANTIZED),
        "quantization_config": (None, _QUANTIZED),
        "hidden_act": ("silu", "other activations are not supported"),
        "use_sliding_window": (False, "sliding-window attention is not supported"),
        "attention_bias": (True, "q, k and v always have a bias here"),
        "qkv_bias": (True, "q, k and v always have a bias here"),
        "mlp_bias": (False, "biases in the MLP are not supported"),
        "rope_scaling.type": ("default", _ROPE),
        "rope_scaling.rope_type": ("default", _ROPE),
        "rope_scaling.factor": (None, _ROPE),
        "rope_scaling.partial_rotary_factor": (1.0, "rotating only a part of a head is not supported"),
        "rope_parameters.type": ("default", _ROPE),
        "rope_parameters.rope_type": ("default", _ROPE),
        "rope_parameters.factor": (None, _ROPE),
        "rope_parameters.partial_rotary_factor": (1.0, "rotating only a part of a head is not supported"),
        "partial_rotary_factor": (1.0, "rotating only a part of a head is not supported"),
        "use_mrope": (False, "multimodal RoPE is not supported"),
        "dual_chunk_attention_config": (None, "dual chunk attention is not supported; remove the key to do without it"),
    },
}


@dataclass(frozen=True)
class QWenConfig:
    """The facts that define a Qwen model's function. Impossible ones are a ValueError naming field and value."""

    architecture: str  # QWEN1 or QWEN2
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_size: int
    mlp_hidden_size: int  # width of one branch
    norm_epsilon: float
    rotary_base: float
    seq_length: int  # the trained length S: dynamic NTK and log-n act beyond it
    max_position_embeddings: int
    use_dynamic_ntk: bool
    use_logn_attn: bool
    tie_word_embeddings: bool

    def __post_init__(self) -> None:
        if self.architecture not in KEYS:
            raise ValueError(f"architecture is {self.architecture!r}, expected one of {', '.join(KEYS)}")
        for field, allowed in RANGES.items():
            _check(field, getattr(self, field), allowed)
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads is {self.num_attention_heads}, expected a multiple of the "
                f"{self.num_key_value_heads} key/value heads"
            )
        if self.head_size % 2:
            raise ValueError(f"the head size is {self.head_size}, expected an even number: RoPE turns pairs")
        if self.use_dynamic_ntk and self.head_size < 4:
            raise ValueError(f"the head size is {self.head_size}, expected at least 4 with use_dynamic_ntk")

    @classmethod
    def from_hf_dir(cls, path: str | Path, *, accepts_quantized: bool = False) -> "QWenConfig":
        """Read `path`/config.json; only a caller that reads quantized weights accepts a quantization_config."""
        file = Path(path) / "config.json"
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise ValueError(f"{file}: cannot be read ({error.strerror}), expected a Qwen config.json") from error
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file}: not valid JSON ({error}), expected a Qwen config.json") from error
        return cls.from_dict(data, str(file), accepts_quantized=accepts_quantized)

    @classmethod
    def from_dict(cls, data: dict[str, Any], source: str, *, accepts_quantized: bool = False) -> "QWenConfig":
        """Read the content of a config.json; `source` names it in errors."""
        try:
            architecture = _architecture(data)
            if accepts_quantized:
                data = {key: value for key, value in data.items() if key != "quantization_config"}
            _refuse_options(data, architecture)
            return cls(architecture=architecture, **_READERS[architecture](data))
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error


def _architecture(data: Any) -> str:
    if not isinstance(data, dict):
        raise ValueError(f"the top level is {shortened(data)}, expected an object")
    found = data.get("architectures")
    if isinstance(found, list) and len(found) == 1 and found[0] in tuple(KEYS):
        return str(found[0])
    raise ValueError(f"architectures is {shortened(found)}, supported are [{'] and ['.join(map(repr, KEYS))}]")


def _refuse_options(data: dict[str, Any], architecture: str) -> None:
    for key, (expected, meaning) in EXPECTED[architecture].items():
        found = _look_up(data, key)
        # True == 1 in Python, but not in JSON.
        if found is not None and (found != expected or isinstance(found, bool) != isinstance(expected, bool)):
            wanted = "absent" if expected is None else json.dumps(expected)
            raise ValueError(f"{key} is {shortened(found)}, expected {wanted}: {meaning}")


def _read_qwen1(data: dict[str, Any]) -> dict[str, Any]:
    facts = _read_facts(data, QWEN1, {"tie_word_embeddings": False})
    heads, head_size, both_branches = facts["num_attention_heads"], facts["head_size"], facts["mlp_hidden_size"]
    if facts["hidden_size"] != heads * head_size:
        raise ValueError(
            f"hidden_size (n_embd) is {facts['hidden_size']}, expected num_attention_heads {heads} x kv_channels "
            f"{head_size} = {heads * head_size}"
        )
    if both_branches % 2:
        raise ValueError(
            f"intermediate_size (ffn_hidden_size) is {both_branches}, expected an even number: it counts both branches "
            f"of the MLP"
        )
    return facts | {"num_key_value_heads": heads, "mlp_hidden_size": both_branches // 2}


def _read_qwen2(data: dict[str, Any]) -> dict[str, Any]:
    layer_types = data.get("layer_types") or []
    if not isinstance(layer_types, list) or any(layer_type != "full_attention" for layer_type in layer_types):
        raise ValueError(f"layer_types is {shortened(layer_types)}, expected only 'full_attention'")
    facts = _read_facts(data, QWEN2, {"tie_word_embeddings": False, "head_size": None})
    heads = facts["num_attention_heads"]
    if facts["head_size"] is None:
        if facts["hidden_size"] % heads:
            raise ValueError(
                f"hidden_size is {facts['hidden_size']}, expected a multiple of num_attention_heads {heads}, or a "
                f"head_dim"
            )
        facts["head_size"] = facts["hidden_size"] // heads
    return facts | {
        "seq_length": facts["max_position_embeddings"],
        "use_dynamic_ntk": False,
        "use_logn_attn": False,
    }


_READERS = {QWEN1: _read_qwen1, QWEN2: _read_qwen2}


def _read_facts(data: dict[str, Any], architecture: str, defaults: dict[str, Any]) -> dict[str, Any]:
    """The architecture's fields out of `data`, checked; a field in `defaults` may be missing."""
    facts: dict[str, Any] = {}
    for field, keys in KEYS[architecture].items():
        allowed = RANGES[field]
        present = {key: found for key in keys if (found := _look_up(data, key)) is not None}
        if not present and field not in defaults:
            raise ValueError(f"{' (or '.join(keys)}{')' * (len(keys) - 1)} is missing, expected {allowed}")
        for key, found in present.items():
            _check(key, found, allowed)
        if len(set(present.values())) > 1:
            listed = " but ".join(f"{key} is {found!r}" for key, found in present.items())
            raise ValueError(f"{listed}, expected the same value")
        value = next(iter(present.values())) if present else defaults[field]
        facts[field] = float(value) if allowed.kind is float else value
    return facts


def _look_up(data: dict[str, Any], key: str) -> Any:
    """The value under a key, or under "object.key"; None when absent or null."""
    outer, _, inner = key.partition(".")
    found = data.get(outer)
    if not inner or found is None:
        return found
    if not isinstance(found, dict):
        raise ValueError(f"{outer} is {shortened(found)}, expected an object or null")
    return found.get(inner)


def _check(name: str, value: Any, allowed: Range) -> None:
    kinds = (int, float) if allowed.kind is float else (allowed.kind,)
    # `type`, not `isinstance`: true is no integer here. NaN fails the comparison.
    if type(value) not in kinds or (allowed.kind is not bool and not allowed.low <= value <= allowed.high):
        raise ValueError(f"{name} is {shortened(value)}, expected {allowed}")
