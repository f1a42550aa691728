"""Hands the weights of a Hugging Face Qwen checkpoint to a QWenForCausalLM, tensor by tensor, for one rank.

Two tables say where every parameter comes from and how ranks share it. Before anything is loaded, the checkpoint's
headers are held against them: names, shapes and dtypes must all be right. Loading itself happens later, when the
engine is written: each parameter gets a function that reads its own rows or columns and nothing else.
Does not know dtypes of engines (Parameter casts) nor file formats (hf_checkpoint.py reads).
"""

import logging
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from hf_checkpoint import READABLE_DTYPES, HfCheckpoint

from tensorrt_llm.dtype import is_floating
from tensorrt_llm.mapping import Mapping
from tensorrt_llm.models.qwen.config import QWEN1, QWEN2, QWenConfig
from tensorrt_llm.module import Module
from tensorrt_llm.parameter import cast_finite
from tensorrt_llm.quantization import QuantizedWeight, quantize_weight
from tensorrt_llm.quantization.layers import WeightOnlyMatmul

logger = logging.getLogger(__name__)

_NAMES_PER_LIST = 8  # a longer list in an error is cut, with a count
_ROWS_COMPARED = 4096  # at a time: a bounded part of a large embedding is in memory


def load_from_hf_qwen(
    model: Module, hf_model_dir: str | Path, config: QWenConfig, mapping: Mapping | None = None
) -> None:
    """Set a loader on every parameter of `model`, which is this rank's part of the checkpoint's model.

    Nothing is read yet but headers. A checkpoint that does not fit `config` tensor by tensor is one ValueError.
    """
    mapping = mapping or Mapping()
    checkpoint = HfCheckpoint(hf_model_dir)
    check_complete(checkpoint, config)
    origins = origins_of(config)
    for path, module in model.named_modules():
        if isinstance(module, WeightOnlyMatmul):
            split, sources = origins[f"{path}.weight"]
            module.set_loader(partial(_quantize, f"{path}.weight", module, split(sources, config, mapping), checkpoint))
    for name, parameter in model.named_parameters():
        if name not in origins or not is_floating(parameter.dtype):
            continue  # what quantization made of a weight
        split, sources = origins[name]
        share = split(sources, config, mapping)
        if share.shape != parameter.shape:
            raise ValueError(
                f"{name}: rank {mapping.tp_rank} of {mapping.tp_size} has {list(share.shape)}, "
                f"but the model was made for {list(parameter.shape)}"
            )
        parameter.set_loader(partial(share.read, checkpoint))


def _quantize(name: str, module: WeightOnlyMatmul, share: "Share", checkpoint: HfCheckpoint) -> QuantizedWeight:
    """This rank's part of the quantized weight, equal to that part of the whole: rows are quantized at full length."""
    weight = cast_finite(share.whole_rows().read(checkpoint), module.dtype, name)
    quantized = quantize_weight(weight, module.bits, module.whole_group_size)
    return quantized if share.columns is None else quantized.columns(*share.columns)


@dataclass(frozen=True)
class Source:
    """A whole HF tensor."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Piece:
    """A run of rows (axis 0) or columns (axis 1) of an HF tensor, or all of it (axis None)."""

    name: str
    shape: tuple[int, ...]
    axis: int | None = None
    start: int = 0

    def read(self, checkpoint: HfCheckpoint) -> torch.Tensor:
        if self.axis is None:
            return checkpoint.read(self.name)
        read = checkpoint.read_rows if self.axis == 0 else checkpoint.read_columns
        return read(self.name, self.start, self.start + self.shape[self.axis])


@dataclass(frozen=True)
class Share:
    """What one rank holds of a parameter: pieces below each other, then rows of zeros."""

    pieces: tuple[Piece, ...]
    zero_rows: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        return (sum(piece.shape[0] for piece in self.pieces) + self.zero_rows, *self.pieces[0].shape[1:])

    @property
    def columns(self) -> tuple[int, int] | None:
        """The first column and the one behind the last, of a part of the columns; None for all of them."""
        piece = self.pieces[0]
        return (piece.start, piece.start + piece.shape[1]) if piece.axis == 1 else None

    def whole_rows(self) -> "Share":
        """The same rows with all their columns."""
        if self.columns is None:
            return self
        (piece,) = self.pieces
        return Share((Piece(piece.name, piece.shape),))

    def read(self, checkpoint: HfCheckpoint) -> torch.Tensor:
        parts = [piece.read(checkpoint) for piece in self.pieces]
        if self.zero_rows:
            parts.append(parts[0].new_zeros((self.zero_rows, *parts[0].shape[1:])))
        return parts[0] if len(parts) == 1 else torch.cat(parts)


# From the HF tensors of a parameter to one rank's share of it.
Split = Callable[[tuple[Source, ...], QWenConfig, Mapping], Share]


def whole(sources: tuple[Source, ...], config: QWenConfig, mapping: Mapping) -> Share:
    """Every rank holds everything."""
    (source,) = sources
    return Share((Piece(source.name, source.shape),))


def split_rows(sources: tuple[Source, ...], config: QWenConfig, mapping: Mapping) -> Share:
    """Ranks hold equal runs of rows: each makes its part of the outputs."""
    (source,) = sources
    rows, columns = source.shape
    count = _equal_share(source.name, rows, mapping.tp_size)
    return Share((Piece(source.name, (count, columns), 0, mapping.tp_rank * count),))


def split_columns(sources: tuple[Source, ...], config: QWenConfig, mapping: Mapping) -> Share:
    """Ranks hold equal runs of columns: each reads its part of the inputs, and the results are added."""
    (source,) = sources
    rows, columns = source.shape
    count = _equal_share(source.name, columns, mapping.tp_size)
    return Share((Piece(source.name, (rows, count), 1, mapping.tp_rank * count),))


def split_padded_rows(sources: tuple[Source, ...], config: QWenConfig, mapping: Mapping) -> Share:
    """As split_rows, with zero rows at the end so that any number of rows divides (lm_head)."""
    (source,) = sources
    rows, columns = source.shape
    count = -(-rows // mapping.tp_size)
    start = min(mapping.tp_rank * count, rows)
    stored = min(count, rows - start)
    return Share((Piece(source.name, (stored, columns), 0, start),), zero_rows=count - stored)


def split_qkv(sources: tuple[Source, ...], config: QWenConfig, mapping: Mapping) -> Share:
    """Ranks hold whole heads: their rows of Q, then of K, then of V. The sources are one tensor (Q|K|V) or three.

    With more ranks than key/value heads, tp_size / num_key_value_heads neighbours hold the same head.
    """
    heads, kv_heads, tp_size = config.num_attention_heads, config.num_key_value_heads, mapping.tp_size
    if len(sources) == tp_size == 1:
        return whole(sources, config, mapping)  # it lies in this order; pieces would be copied together
    q_count, kv_count = _equal_share("num_attention_heads", heads, tp_size), -(-kv_heads // tp_size)
    if kv_heads % tp_size and tp_size % kv_heads:
        raise ValueError(f"num_key_value_heads is {kv_heads}: neither it nor tp_size {tp_size} divides the other")
    q_first, kv_first = mapping.tp_rank * q_count, mapping.tp_rank * kv_heads // tp_size
    if len(sources) == 1:
        sources, k_offset, v_offset = sources * 3, heads, heads + kv_heads
    else:
        k_offset = v_offset = 0
    runs = ((q_first, q_count), (k_offset + kv_first, kv_count), (v_offset + kv_first, kv_count))
    size = config.head_size
    return Share(
        tuple(
            Piece(source.name, (count * size, *source.shape[1:]), 0, first * size)
            for source, (first, count) in zip(sources, runs, strict=True)
        )
    )


def _equal_share(what: str, total: int, tp_size: int) -> int:
    if total % tp_size:
        raise ValueError(f"{what}: {total} to split, expected a multiple of tp_size {tp_size}")
    return total // tp_size


@dataclass(frozen=True)
class Rule:
    """A parameter, how ranks share it, and the HF tensors it is made of with their shapes in the letters of `_dims`."""

    parameter: str
    split: Split
    sources: dict[str, str]


# The activated branch of the MLP is `fc`: w2 in Qwen-1, gate_proj in Qwen2.
RULES = {
    QWEN1: (
        Rule("vocab_embedding.weight", whole, {"transformer.wte.weight": "V h"}),
        Rule("layers.{i}.ln_1.weight", whole, {"transformer.h.{i}.ln_1.weight": "h"}),
        Rule("layers.{i}.attention.qkv.weight", split_qkv, {"transformer.h.{i}.attn.c_attn.weight": "qkv h"}),
        Rule("layers.{i}.attention.qkv.bias", split_qkv, {"transformer.h.{i}.attn.c_attn.bias": "qkv"}),
        Rule("layers.{i}.attention.dense.weight", split_columns, {"transformer.h.{i}.attn.c_proj.weight": "h q"}),
        Rule("layers.{i}.ln_2.weight", whole, {"transformer.h.{i}.ln_2.weight": "h"}),
        Rule("layers.{i}.mlp.fc.weight", split_rows, {"transformer.h.{i}.mlp.w2.weight": "m h"}),
        Rule("layers.{i}.mlp.gate.weight", split_rows, {"transformer.h.{i}.mlp.w1.weight": "m h"}),
        Rule("layers.{i}.mlp.proj.weight", split_columns, {"transformer.h.{i}.mlp.c_proj.weight": "h m"}),
        Rule("ln_f.weight", whole, {"transformer.ln_f.weight": "h"}),
        Rule("lm_head.weight", split_padded_rows, {"lm_head.weight": "V h"}),
    ),
    QWEN2: (
        Rule("vocab_embedding.weight", whole, {"model.embed_tokens.weight": "V h"}),
        Rule("layers.{i}.ln_1.weight", whole, {"model.layers.{i}.input_layernorm.weight": "h"}),
        Rule(
            "layers.{i}.attention.qkv.weight",
            split_qkv,
            {
                "model.layers.{i}.self_attn.q_proj.weight": "q h",
                "model.layers.{i}.self_attn.k_proj.weight": "kv h",
                "model.layers.{i}.self_attn.v_proj.weight": "kv h",
            },
        ),
        Rule(
            "layers.{i}.attention.qkv.bias",
            split_qkv,
            {
                "model.layers.{i}.self_attn.q_proj.bias": "q",
                "model.layers.{i}.self_attn.k_proj.bias": "kv",
                "model.layers.{i}.self_attn.v_proj.bias": "kv",
            },
        ),
        Rule("layers.{i}.attention.dense.weight", split_columns, {"model.layers.{i}.self_attn.o_proj.weight": "h q"}),
        Rule("layers.{i}.ln_2.weight", whole, {"model.layers.{i}.post_attention_layernorm.weight": "h"}),
        Rule("layers.{i}.mlp.fc.weight", split_rows, {"model.layers.{i}.mlp.gate_proj.weight": "m h"}),
        Rule("layers.{i}.mlp.gate.weight", split_rows, {"model.layers.{i}.mlp.up_proj.weight": "m h"}),
        Rule("layers.{i}.mlp.proj.weight", split_columns, {"model.layers.{i}.mlp.down_proj.weight": "h m"}),
        Rule("ln_f.weight", whole, {"model.norm.weight": "h"}),
        Rule("lm_head.weight", split_padded_rows, {"lm_head.weight": "V h"}),
    ),
}

# Tensors that a checkpoint may hold and no parameter wants, and why that is right.
HARMLESS = (
    (r".*\.inv_freq", "RoPE frequencies follow from the config"),
    (r"transformer\.h\.\d+\.attn\.(masked_bias|logn_tensor)", "constants of the first releases' attention"),
)


def _dims(config: QWenConfig) -> dict[str, int]:
    q, kv = (heads * config.head_size for heads in (config.num_attention_heads, config.num_key_value_heads))
    return {
        "V": config.vocab_size,
        "h": config.hidden_size,
        "m": config.mlp_hidden_size,
        "q": q,
        "kv": kv,
        "qkv": q + 2 * kv,
    }


def origins_of(config: QWenConfig) -> dict[str, tuple[Split, tuple[Source, ...]]]:
    """Every parameter of the whole model: how it is split, and the HF tensors that it is made of."""
    dims = _dims(config)
    origins = {}
    for rule in RULES[config.architecture]:
        for layer in range(config.num_hidden_layers if "{i}" in rule.parameter else 1):
            sources = tuple(
                Source(name.format(i=layer), tuple(dims[letter] for letter in letters.split()))
                for name, letters in rule.sources.items()
            )
            origins[rule.parameter.format(i=layer)] = (rule.split, sources)
    if config.tie_word_embeddings:
        origins["lm_head.weight"] = (split_padded_rows, origins["vocab_embedding.weight"][1])
    return origins


def check_complete(checkpoint: HfCheckpoint, config: QWenConfig) -> None:
    """Prove from the headers that the checkpoint holds the tensors of `config`'s model, right in shape and dtype, and
    no others; whatever is wrong is listed in one ValueError."""
    found = checkpoint.tensors()
    wanted = {source.name: source for _, sources in origins_of(config).values() for source in sources}
    harmless = HARMLESS + ((r"lm_head\.weight", "tied to the embedding, and equal"),) * config.tie_word_embeddings
    ignored = {
        name: reason
        for name in found.keys() - wanted.keys()
        for pattern, reason in harmless
        if re.fullmatch(pattern, name)
    }
    both = sorted(found.keys() & wanted.keys())
    faults = {
        "missing": (f"{name} {list(source.shape)}" for name, source in wanted.items() if name not in found),
        "left over": (
            f"{name} {list(found[name].shape)}" for name in sorted(found.keys() - wanted.keys() - ignored.keys())
        ),
        "of wrong shape": (
            f"{name} is {list(found[name].shape)}, expected {list(wanted[name].shape)}"
            for name in both
            if found[name].shape != wanted[name].shape
        ),
        f"of wrong dtype (expected {', '.join(READABLE_DTYPES)})": (
            f"{name} is {found[name].dtype}" for name in both if found[name].dtype not in READABLE_DTYPES
        ),
    }
    lists = [_list(what, names) for what, names in faults.items()]
    if any(lists):
        raise ValueError(
            f"{checkpoint.directory}: the tensors are not those of a {config.architecture} with this config.json: "
            + "; ".join(filter(None, lists))
        )
    if "lm_head.weight" in ignored:
        _check_tied(checkpoint, "lm_head.weight", origins_of(config)["vocab_embedding.weight"][1][0])
    for reason in sorted(set(ignored.values())):
        names = sorted(name for name in ignored if ignored[name] == reason)
        logger.info("not loaded, as %s: %s", reason, _cut(names))


def _check_tied(checkpoint: HfCheckpoint, name: str, embedding: Source) -> None:
    """A stored copy of the tied embedding must be a copy: otherwise one of the two would be dropped in silence."""
    rows = embedding.shape[0]
    if checkpoint.tensors()[name].shape != embedding.shape or not all(
        torch.equal(
            checkpoint.read_rows(name, start, min(start + _ROWS_COMPARED, rows)),
            checkpoint.read_rows(embedding.name, start, min(start + _ROWS_COMPARED, rows)),
        )
        for start in range(0, rows, _ROWS_COMPARED)
    ):
        raise ValueError(
            f"{checkpoint.directory}: {name} differs from {embedding.name}, expected a copy as config.json says "
            f"tie_word_embeddings; if they are not tied, set that to false"
        )


def _list(what: str, lines: Iterable[str]) -> str:
    lines = list(lines)
    return f"{len(lines)} {what}: {_cut(lines)}" if lines else ""


def _cut(lines: list[str]) -> str:
    more = len(lines) - _NAMES_PER_LIST
    return ", ".join(lines[:_NAMES_PER_LIST]) + (f" and {more} more" if more > 0 else "")
