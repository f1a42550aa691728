"""Where every parameter of a QWenForCausalLM comes from in a Hugging Face checkpoint, and how ranks share it: tables.

A Share is what one rank holds of a parameter: runs of rows or columns of HF tensors. Knows names, shapes and splits;
weight.py does the loading.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from tensorrt_llm.mapping import Mapping
from tensorrt_llm.models.qwen.config import QWEN1, QWEN2, QWenConfig

from .hf_checkpoint import HfCheckpoint


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

    @property
    def module(self) -> str:
        """The HF module whose tensor this is."""
        return self.name.rpartition(".")[0]

    @property
    def rows(self) -> tuple[int, int]:
        """The first row and the one behind the last."""
        start = self.start if self.axis == 0 else 0
        return start, start + self.shape[0]

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
