"""What lies in an FT folder: the names, shapes and dtypes of its files, and how ranks share a tensor.

    <root>/<tp>-gpu/config.ini, *.bin      headerless, little-endian, C order; matrices [in, out]

NAMES and RULES below say all of it. To the outside a tensor has the path and the orientation that it has in the
network: "layers.3.mlp.fc", [out, in]. The files are those of the original converter; where they differ from its own:

  * "Per tensor" has one scale for each of Q, K and V, spread over all outputs of qkv. As in the original that file is
    not split over ranks. The loader takes the rank's part of it, so these modes work with several ranks.
  * With --smoothquant the storage-dtype copies of the quantized weights are left out, unless asked for. Then they are
    those of the checkpoint, with its norms in <norm>.unsmoothed.weight.bin: the original's copies were smoothed, and
    its dense and c_proj were wrong without a division by their smoothers.
  * A norm is divided by its smoothing factors and rounded; the weights behind it are multiplied by what that division
    came to, so the rounding has no effect.
  * Grouped key/value heads: qkv has q + 2 kv outputs. With more ranks than such heads, ranks hold copies.
  * A tied output layer has no file of its own: it is the embedding.
  * attention.qkv.scale_y_quant_orig, the scale of an int8 KV cache, covers Q too, as the original's. Nothing here reads
    it: the cache makes its scales at run time.
  * calibration_ids.npy: the token ids that were read, int32 [texts, longest], padded with -1.
"""

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch
from checkpoint.weight_map import Share, Source, Split, origins_of

from tensorrt_llm.dtype import itemsize
from tensorrt_llm.mapping import Mapping
from tensorrt_llm.models.qwen.config import QWEN1, QWEN2, QWenConfig

# Paths in the network, and what files call them.
NAMES = {
    QWEN1: {
        "vocab_embedding": "vocab_embedding",
        "ln_f": "ln_f",
        "lm_head": "lm_head",
        "layers.{i}.ln_1": "model.layers.{i}.ln_1",
        "layers.{i}.attention.qkv": "model.layers.{i}.attention.qkv",
        "layers.{i}.attention.dense": "model.layers.{i}.attention.dense",
        "layers.{i}.ln_2": "model.layers.{i}.ln_2",
        "layers.{i}.mlp.fc": "model.layers.{i}.mlp.w2",
        "layers.{i}.mlp.gate": "model.layers.{i}.mlp.w1",
        "layers.{i}.mlp.proj": "model.layers.{i}.mlp.c_proj",
    },
    QWEN2: {
        "vocab_embedding": "embed_tokens",
        "ln_f": "norm",
        "lm_head": "lm_head",
        "layers.{i}.ln_1": "model.layers.{i}.input_layernorm",
        "layers.{i}.attention.qkv": "model.layers.{i}.self_attn.qkv",
        "layers.{i}.attention.dense": "model.layers.{i}.self_attn.o_proj",
        "layers.{i}.ln_2": "model.layers.{i}.post_attention_layernorm",
        "layers.{i}.mlp.fc": "model.layers.{i}.mlp.gate_proj",
        "layers.{i}.mlp.gate": "model.layers.{i}.mlp.up_proj",
        "layers.{i}.mlp.proj": "model.layers.{i}.mlp.down_proj",
    },
}

# Members of a layer by what their files have in common.
QKV = ("attention.qkv",)
MLP_INPUTS = ("mlp.fc", "mlp.gate")
COLUMN = (*QKV, *MLP_INPUTS)  # ranks share the outputs
ROW = ("attention.dense", "mlp.proj")  # ranks share the inputs
LINEARS = (*COLUMN, *ROW)
NORMS = ("ln_1", "ln_2")

# Parts of a folder: what it holds depends on how it was converted.
ALWAYS, UNQUANTIZED, UNSMOOTHED, SMOOTHED, KV_SCALE = "always", "unquantized", "unsmoothed", "smoothed", "kv scale"


@dataclass(frozen=True)
class Rule:
    """A file of some modules; `{r}` in its name is the rank."""

    file: str
    modules: tuple[str, ...]
    shape: tuple[str, ...]  # "in" and "out" of the whole weight, "in/r" and "out/r" of a rank's, "1"
    dtype: str  # "storage", "int8", or "scale": float32, finite and above zero
    part: str


RULES = (
    Rule("weight.bin", ("vocab_embedding", "lm_head"), ("out", "in"), "storage", ALWAYS),
    Rule("weight.bin", ("ln_f", *NORMS), ("out",), "storage", ALWAYS),
    Rule("bias.{r}.bin", QKV, ("out/r",), "storage", ALWAYS),
    Rule("weight.{r}.bin", LINEARS, ("in/r", "out/r"), "storage", UNQUANTIZED),
    Rule("unsmoothed.weight.bin", NORMS, ("out",), "storage", UNSMOOTHED),
    Rule("weight.int8.{r}.bin", LINEARS, ("in/r", "out/r"), "int8", SMOOTHED),
    Rule("weight.int8.col.{r}.bin", LINEARS, ("in/r", "out/r"), "int8", SMOOTHED),
    Rule("scale_x_orig_quant.bin", LINEARS, ("1",), "scale", SMOOTHED),
    Rule("scale_y_quant_orig.bin", LINEARS, ("1",), "scale", SMOOTHED),
    Rule("scale_y_quant_orig.bin", QKV, ("1",), "scale", KV_SCALE),
    Rule("scale_w_quant_orig.bin", QKV, ("out",), "scale", SMOOTHED),
    Rule("scale_w_quant_orig.bin", (*MLP_INPUTS, *ROW), ("1",), "scale", SMOOTHED),
    Rule("scale_y_accum_quant.bin", QKV, ("out",), "scale", SMOOTHED),
    Rule("scale_y_accum_quant.bin", (*MLP_INPUTS, *ROW), ("1",), "scale", SMOOTHED),
    Rule("scale_w_quant_orig.col.{r}.bin", COLUMN, ("out/r",), "scale", SMOOTHED),
    Rule("scale_w_quant_orig.col.bin", ROW, ("out",), "scale", SMOOTHED),
    Rule("scale_y_accum_quant.col.{r}.bin", COLUMN, ("out/r",), "scale", SMOOTHED),
    Rule("scale_y_accum_quant.col.bin", ROW, ("out",), "scale", SMOOTHED),
    Rule("smoother.{r}.bin", ROW, ("in/r",), "scale", SMOOTHED),
)


@dataclass(frozen=True)
class FtFile:
    """What one file holds."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    is_scale: bool

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * itemsize(self.dtype)


@dataclass(frozen=True)
class FtLayout:
    """The files of a model for a number of ranks."""

    config: QWenConfig
    tp_size: int
    storage_dtype: str

    def files(self, parts: Collection[str]) -> list[FtFile]:
        """Every file of these parts, each once."""
        paths = (name.removesuffix(".weight") for name in self._origins if name.endswith(".weight"))
        found = (
            file
            for path in paths
            for rule in RULES
            if rule.part in parts and member_of(path) in rule.modules
            for file in self.files_of(path, rule.file)
        )
        return list(dict.fromkeys(found))

    def files_of(self, path: str, file: str) -> list[FtFile]:
        """One for each rank if `{r}` is in the file's name, else one."""
        rule = _rule_of(path, file)
        whole = self._shape_of(path)
        dtype = {"storage": self.storage_dtype, "scale": "float32"}.get(rule.dtype, rule.dtype)
        found = []
        for rank in range(self.tp_size if "{r}" in file else 1):
            share = self._share(path, whole, rank).shape
            sizes = {"1": 1, "out": whole[0], "in": whole[-1], "out/r": share[0], "in/r": share[-1]}
            shape = tuple(sizes[letter] for letter in rule.shape)
            found.append(FtFile(self._name(path, file, rank), shape, dtype, rule.dtype == "scale"))
        return found

    def split(self, path: str, file: str, whole: torch.Tensor) -> Iterator[torch.Tensor]:
        """What the files hold of a whole tensor, [out, in] or a vector."""
        rule = _rule_of(path, file)
        if "{r}" not in file:
            yield whole
            return
        matrix = _as_matrix(whole, rule)
        for rank in range(self.tp_size):
            part = _take(matrix, self._share(path, tuple(matrix.shape), rank))
            yield part.T if whole.dim() == 2 else part.flatten()

    def join(self, path: str, file: str, parts: list[torch.Tensor]) -> torch.Tensor:
        """The whole tensor, of what the files hold."""
        if "{r}" not in file:
            return parts[0]
        parts = [_turned(part) for part in parts]
        if self.tp_size == 1:
            return parts[0]
        rule, whole = _rule_of(path, file), self._shape_of(path)
        if len(rule.shape) == 1:
            whole = (whole[0], 1) if rule.shape == ("out/r",) else (1, whole[1])
        matrix = parts[0].new_empty(whole)
        for rank, part in enumerate(parts):
            _put(matrix, self._share(path, whole, rank), _as_matrix(part, rule))
        return matrix if parts[0].dim() == 2 else matrix.flatten()

    def of_rank(self, path: str, file: str, part: torch.Tensor, rank: int) -> torch.Tensor:
        """A rank's tensor, of what its file holds or of what one file holds for all ranks."""
        if "{r}" in file:
            return _turned(part)
        matrix = part if part.dim() == 2 else part[:, None]
        share = _take(matrix, self._share(path, tuple(matrix.shape), rank))
        return share if part.dim() == 2 else share.flatten()

    @cached_property
    def _origins(self) -> dict[str, tuple[Split, tuple[Source, ...]]]:
        return origins_of(self.config)

    def _shape_of(self, path: str) -> tuple[int, ...]:
        """Of the whole weight."""
        _, sources = self._origins[f"{path}.weight"]
        return (sum(source.shape[0] for source in sources), *sources[0].shape[1:])

    def _share(self, path: str, shape: tuple[int, ...], rank: int) -> Share:
        """The rank's share of a tensor of this shape that is split as the weight at `path` is."""
        split, _ = self._origins[f"{path}.weight"]
        mapping = Mapping(world_size=self.tp_size, rank=rank, tp_size=self.tp_size)
        return split((Source(path, shape),), self.config, mapping)

    def _name(self, path: str, file: str, rank: int) -> str:
        if path == "lm_head" and self.config.tie_word_embeddings:
            path = "vocab_embedding"
        layer = re.match(r"layers\.(\d+)\.", path)
        name = NAMES[self.config.architecture][f"layers.{{i}}.{member_of(path)}" if layer else path]
        return f"{name}.{file}".format(i=layer and layer[1], r=rank)


def member_of(path: str) -> str:
    """The path inside of its layer; all of it outside of the layers."""
    return re.sub(r"^layers\.\d+\.", "", path)


def _rule_of(path: str, file: str) -> Rule:
    return next(rule for rule in RULES if rule.file == file and member_of(path) in rule.modules)


def _turned(part: torch.Tensor) -> torch.Tensor:
    """[in, out] -> [out, in]; a vector stays."""
    return part.T if part.dim() == 2 else part


def _as_matrix(tensor: torch.Tensor, rule: Rule) -> torch.Tensor:
    """A vector of outputs as [out, 1], one of inputs as [1, in]: they are split as the weight is."""
    if tensor.dim() == 2:
        return tensor
    return tensor[None] if rule.shape == ("in/r",) else tensor[:, None]


def _take(whole: torch.Tensor, share: Share) -> torch.Tensor:
    """The share's pieces of one tensor below each other, then its rows of zeros."""
    parts = [
        whole if piece.axis is None else whole.narrow(piece.axis, piece.start, piece.shape[piece.axis])
        for piece in share.pieces
    ]
    if share.zero_rows:
        parts.append(whole.new_zeros((share.zero_rows, *whole.shape[1:])))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _put(whole: torch.Tensor, share: Share, part: torch.Tensor) -> None:
    """Undo `_take`: write the part where its pieces are from."""
    for piece, rows in zip(share.pieces, part.split([piece.shape[0] for piece in share.pieces]), strict=True):
        assert piece.axis is not None, "split tensors only"
        whole.narrow(piece.axis, piece.start, piece.shape[piece.axis]).copy_(rows)
