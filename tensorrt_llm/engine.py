"""The engine: one data-only file per rank, and config.json beside the files. Writes them, and checks what they say.

The file holds the config, the plan and the weights, in the form that engine_file.py describes. What a GPU measured, and
may measure later, lies in a file of its own beside it: timings.py. Knows no kernel.
"""

import hashlib
import json
import os
import struct
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from reprlib import repr as shortened
from typing import Any

import torch

from .disk import check_room
from .dtype import PRECISIONS, itemsize, torch_dtype
from .engine_file import FORMAT, FORMAT_VERSION, ZERO_DIGEST, EngineFile, engine_path, naming, read_builder_config
from .limits import LARGEST_COUNT, Limits
from .plan import Plan, TensorSpec
from .quantization.mode import QuantMode
from .verdict import Verdict
from .weight_digests import num_threads, piece_digest, pieces_of, weight_digest
from .weight_file import WeightFile

_SAFETENSORS_DTYPES = {
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
}
# What the runtime gives a plan at every step, besides one KV pool per layer.
_STEP_INPUTS = {
    "input_ids",
    "position_ids",
    "query_starts",
    "sequence_length",
    "context_lengths",
    "block_tables",
    "last_token_ids",
}
# Weights start here and at each header length that is a multiple of it: enough for any aligned load.
_ALIGNMENT = 256


@dataclass(frozen=True)
class EngineConfig:
    """What an engine is: facts of the model, its share of the ranks, and its limits. Counts are of the whole model."""

    name: str
    architecture: str
    precision: str  # dtype of weights, activations and KV cache, where quant_mode says nothing else
    vocab_size: int
    hidden_size: int
    inter_size: int  # width of one branch of the gated MLP
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    hidden_act: str
    max_position_embeddings: int
    seq_length: int  # the length the model was trained on
    rotary_base: float
    use_dynamic_ntk: bool
    use_logn_attn: bool
    norm_epsilon: float
    quant_mode: int  # bits of QuantMode
    quant_algo: str  # "W8A16", "W4A16_GPTQ"...; empty when nothing is quantized
    batch_invariant: bool  # on CUDA a sequence has the same bits in any batch
    world_size: int
    rank: int
    tp_size: int
    pp_size: int
    limits: Limits
    verdict: Verdict | None  # what quantization cost; None when nothing is quantized, or it was not measured

    def __post_init__(self) -> None:
        for field in fields(self):
            if field.name != "verdict":
                _check_field(field.name, field.type, getattr(self, field.name))
        if self.precision not in PRECISIONS:
            raise ValueError(f"engine config: precision is {self.precision!r}, expected one of {', '.join(PRECISIONS)}")
        if self.rank >= self.world_size or self.tp_size * self.pp_size != self.world_size:
            raise ValueError(
                f"engine config: rank {self.rank} of world_size {self.world_size} = "
                f"tp_size {self.tp_size} x pp_size {self.pp_size} does not add up"
            )

    @property
    def num_kv_heads_per_rank(self) -> int:
        return -(-self.num_kv_heads // self.tp_size)

    @property
    def vocab_size_padded(self) -> int:
        """Rows of the output layer: a multiple of tp_size."""
        return -(-self.vocab_size // self.tp_size) * self.tp_size

    @property
    def kv_dtype(self) -> str:
        return "int8" if QuantMode(self.quant_mode).has_int8_kv_cache() else self.precision

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes that one token takes in this rank's cache, all layers."""
        scale = itemsize("float32") if self.kv_dtype == "int8" else 0
        return 2 * self.num_layers * self.num_kv_heads_per_rank * (self.head_size * itemsize(self.kv_dtype) + scale)

    @property
    def activation_bytes(self) -> int:
        """An upper estimate of what one step holds besides weights and cache, the logits of all its tokens included."""
        per_token = 4 * (6 * self.hidden_size + 4 * self.inter_size + self.vocab_size)
        return self.limits.max_num_tokens * per_token

    @property
    def engine_name(self) -> str:
        """The file of this rank, named as 0.7.1 named it."""
        pp = f"_pp{self.pp_size}" if self.pp_size > 1 else ""
        return f"{self.name}_{self.precision}_tp{self.tp_size}{pp}_rank{self.rank}.engine"

    @classmethod
    def from_dict(cls, data: Any) -> "EngineConfig":
        names = {field.name for field in fields(cls)}
        if not isinstance(data, dict) or set(data) != names:
            found = sorted(map(str, data)) if isinstance(data, dict) else type(data).__name__
            raise ValueError(f"engine config has {found}, expected exactly {sorted(names)}")
        limits = data["limits"]
        limit_names = {field.name for field in fields(Limits)}
        if not isinstance(limits, dict) or set(limits) != limit_names:
            raise ValueError(f"engine config: limits is {limits!r}, expected exactly {sorted(limit_names)}")
        verdict = None if data["verdict"] is None else Verdict.from_dict(data["verdict"])
        return cls(**{**data, "limits": Limits(**limits), "verdict": verdict})

    def to_config_json(self) -> dict[str, dict[str, Any]]:
        """The content of config.json: 0.7.1's two sections, with the facts that its builder_config lacked."""
        facts = asdict(self)
        limits = facts.pop("limits")
        for key in ("rank", "world_size", "tp_size", "pp_size"):
            facts.pop(key)
        return {
            "builder_config": {
                **facts,
                **limits,
                "tensor_parallel": self.tp_size,
                "pipeline_parallel": self.pp_size,
                "max_beam_width": 1,
                "int8": QuantMode(self.quant_mode).quantizes_weights(),
                "fp8": False,
                "strongly_typed": True,
                "use_refit": False,
            },
            "plugin_config": {
                "gpt_attention_plugin": self.precision,
                "gemm_plugin": self.precision,
                "remove_input_padding": True,
                "paged_kv_cache": True,
                "tokens_per_block": self.limits.tokens_per_block,
                "use_custom_all_reduce": False,
            },
        }


def _check_field(name: str, kind: Any, value: Any) -> None:
    accepted = (float, int) if kind is float else kind
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"engine config: {name} is {value!r}, expected {kind.__name__}")
    least = 0 if name in ("rank", "quant_mode") else 1
    if kind is int and not least <= value <= LARGEST_COUNT:
        raise ValueError(f"engine config: {name} is {shortened(value)}, expected {least} to {LARGEST_COUNT}")
    if kind is float and not 0 < value <= sys.float_info.max:  # NaN is not, either
        raise ValueError(f"engine config: {name} is {shortened(value)}, expected a positive number")


class Engine:
    """Config, plan and weights. The weights are read when asked for, one at a time, wherever they come from."""

    def __init__(self, config: EngineConfig, plan: Plan, weights: Mapping[str, torch.Tensor]) -> None:
        self.config = config
        self.plan = plan
        self.weights = weights

    @property
    def weight_bytes(self) -> int:
        return sum(spec.num_bytes for spec in self.plan.weights)

    @property
    def path(self) -> Path | None:
        return self.file.path if self.file else None

    @property
    def file(self) -> EngineFile | None:
        """The file that it was read from."""
        return self.weights.file if isinstance(self.weights, WeightFile) else None

    def checking_weights(self) -> AbstractContextManager[None]:
        """Weights of a file that nobody has checked yet are checked while the body runs."""
        return self.file.checking() if self.file else nullcontext()

    def save(self, path: Path, on_weight: Callable[[str], None] = lambda name: None) -> None:
        """Write the engine file; `on_weight` hears each weight's name before it is read.

        Nothing appears under `path` until all of it is written. ValueError when the disk has no room.
        """
        partial = path.with_name(f".{path.name}.partial")
        try:
            check_room(path.parent, self.weight_bytes, "engine")
            with partial.open("wb") as file:
                self._write(file, on_weight)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except OSError as error:
            raise ValueError(f"{path}: cannot write the engine: {error.strerror}") from error
        finally:
            partial.unlink(missing_ok=True)

    def _write(self, file: Any, on_weight: Callable[[str], None]) -> None:
        digests = {spec.name: ZERO_DIGEST for spec in self.plan.weights}
        header = self._header(digests)
        file.write(struct.pack("<Q", len(header)) + header)
        for spec in self.plan.weights:
            on_weight(spec.name)
            data = _bytes_of(self.weights[spec.name], spec)
            with ThreadPoolExecutor(num_threads()) as pool:  # one for each weight: its threads end and hold nothing
                piece_digests = pool.map(piece_digest, pieces_of(data))
                file.write(data)
            digests[spec.name] = weight_digest(piece_digests)
            del data  # before the next one is read
        header = self._header(digests)
        file.seek(8)
        file.write(header.replace(ZERO_DIGEST.encode(), hashlib.sha256(header).hexdigest().encode()))

    def _header(self, digests: dict[str, str]) -> bytes:
        """The JSON header, as long for any digests, with zeros for its own."""
        entries: dict[str, Any] = {
            "__metadata__": {
                "format": FORMAT,
                "format_version": FORMAT_VERSION,
                # Not sorted: marks are in the order of the network.
                "engine": json.dumps({"config": asdict(self.config), "plan": self.plan.to_dict()}),
                "weights_sha256": json.dumps(digests, sort_keys=True),
                "header_sha256": ZERO_DIGEST,
            }
        }
        begin = 0
        for spec in self.plan.weights:
            end = begin + spec.num_bytes
            entries[spec.name] = {
                "dtype": _SAFETENSORS_DTYPES[spec.dtype],
                "shape": list(spec.shape),
                "data_offsets": [begin, end],
            }
            begin = end
        header = json.dumps(entries, separators=(",", ":")).encode()
        return header + b" " * (-(len(header) + 8) % _ALIGNMENT)

    @classmethod
    def from_dir(
        cls, engine_dir: Path | str, rank: int = 0, *, check_weights: bool = True, opened: EngineFile | None = None
    ) -> "Engine":
        """The engine of `rank` in a folder that build.py wrote, checked as `load` does; `opened` is its file."""
        engine_dir = Path(engine_dir)
        builder_config = read_builder_config(engine_dir)
        path = engine_path(engine_dir, builder_config, rank)
        if opened and opened.path != path:
            raise ValueError(f"{opened.path} is open, but the engine of rank {rank} in {engine_dir} is {path.name}")
        engine = cls.of_file(opened or EngineFile(path), check_weights=check_weights)
        written = engine.config.to_config_json()["builder_config"]
        for key, value in written.items():
            if key in builder_config and _as_json(builder_config[key]) != _as_json(value):
                raise ValueError(
                    f"{engine_dir / 'config.json'}: {key} is {builder_config[key]!r}, but {path.name} has {value!r}; "
                    f"config.json only describes the engine, rebuild to change it"
                )
        return engine

    @classmethod
    def load(cls, path: Path | str, *, check_weights: bool = True) -> "Engine":
        """Read and check an engine file; a ValueError names the file, what was found and what was expected.

        Without `check_weights` their digests are left to what uses them first: Session and walk check them.
        """
        return cls.of_file(EngineFile(Path(path)), check_weights=check_weights)

    @classmethod
    def of_file(cls, file: EngineFile, *, check_weights: bool = True) -> "Engine":
        with naming(file.path):
            config, plan = _read_engine(file)
            _check_tensors(file, plan)
            _check_facts(config, plan)
            weights = WeightFile(file, plan.weights)
        if check_weights:
            file.check()
        return cls(config, plan, weights)


def _as_json(value: Any) -> str:
    """A form in which tuples are lists, and NaN equals itself."""
    return json.dumps(value, sort_keys=True)


def _bytes_of(tensor: torch.Tensor, spec: TensorSpec) -> memoryview:
    assert tuple(tensor.shape) == spec.shape and tensor.dtype == torch_dtype(spec.dtype), f"{spec.name} changed"
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data


def _read_engine(file: EngineFile) -> tuple[EngineConfig, Plan]:
    engine = file.metadata_object("engine")
    if set(engine) != {"config", "plan"}:
        raise ValueError(f"metadata engine has {sorted(engine)}, expected config and plan")
    return EngineConfig.from_dict(engine["config"]), Plan.from_dict(engine["plan"])


def _check_tensors(file: EngineFile, plan: Plan) -> None:
    """The file's tensors must be the plan's, side by side, and fill it; and each must have a digest."""
    begin = 0
    for spec in plan.weights:
        if spec.dtype not in _SAFETENSORS_DTYPES:
            raise ValueError(f"weight {spec} is of a dtype that engines don't hold")
        end = begin + spec.num_bytes
        expected = {
            "dtype": _SAFETENSORS_DTYPES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [begin, end],
        }
        if file.tensors.get(spec.name) != expected:
            raise ValueError(f"tensor {spec.name} is {shortened(file.tensors.get(spec.name))}, expected {expected}")
        begin = end
    surplus = sorted(set(file.tensors) - {spec.name for spec in plan.weights})
    if surplus:
        raise ValueError(f"header holds tensors that the plan does not name: {', '.join(surplus[:5])}")
    if file.data_start + begin != file.num_bytes:
        raise ValueError(
            f"weights take {begin} bytes, the file holds {file.num_bytes - file.data_start}: "
            f"truncated or of another engine"
        )
    if set(file.metadata_object("weights_sha256")) != set(file.tensors):
        raise ValueError("weights_sha256 names other weights than the file holds")


def _check_facts(config: EngineConfig, plan: Plan) -> None:
    """The plan must be of the model that the config describes: what the runtime allocates follows from the config."""
    inputs = {spec.name: spec for spec in plan.inputs}
    pool = ("num_blocks", 2, config.num_kv_heads_per_rank, config.limits.tokens_per_block, config.head_size)
    for layer in range(config.num_layers):
        spec = inputs.pop(f"past_key_value_{layer}", None)
        if spec is None or spec.shape != pool or spec.dtype != config.kv_dtype:
            raise ValueError(f"plan: past_key_value_{layer} is {spec}, expected {config.kv_dtype} {list(pool)}")
        scales = inputs.pop(f"key_value_scales_{layer}", None)
        if (scales is None) == (config.kv_dtype == "int8") or (
            scales and (scales.shape != pool[:-1] or scales.dtype != "float32")
        ):
            wanted = f"float32 {list(pool[:-1])}" if config.kv_dtype == "int8" else "none"
            raise ValueError(f"plan: key_value_scales_{layer} is {scales}, expected {wanted}")
    if set(inputs) != _STEP_INPUTS:
        raise ValueError(f"plan: inputs are {sorted(inputs)}, expected {sorted(_STEP_INPUTS)} and the KV pools")
    if set(plan.outputs) != {"logits"}:
        raise ValueError(f"plan: outputs are {sorted(plan.outputs)}, expected logits")
    logits = next((made for node in plan.nodes for made in node.outputs if made.name == plan.outputs["logits"]), None)
    if logits is None or logits.dtype != "float32" or logits.shape != ("num_logits", config.vocab_size_padded):
        raise ValueError(f"plan: logits are {logits}, expected float32[num_logits, {config.vocab_size_padded}]")
