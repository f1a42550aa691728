"""Hands the weights of a Qwen checkpoint, quantized or not, to a QWenForCausalLM, tensor by tensor, for one rank.

checkpoint/weight_map.py says where every parameter comes from and how ranks share it. Before anything is loaded, the
checkpoint's headers are held against it: names, shapes and dtypes must all be right. Loading itself happens later, when
the engine is written: each parameter gets a function that reads its own rows or columns and nothing else.
Does not know dtypes of engines (Parameter casts) nor file formats (checkpoint/ reads).
"""

import logging
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from checkpoint.hf_checkpoint import READABLE_DTYPES, HfCheckpoint, TensorInfo
from checkpoint.packed_linear import PackedLinear
from checkpoint.quantized_checkpoint import QuantizedCheckpoint
from checkpoint.weight_map import Share, Source, origins_of

from tensorrt_llm.dtype import is_floating
from tensorrt_llm.mapping import Mapping
from tensorrt_llm.models.qwen.config import QWenConfig
from tensorrt_llm.module import Module
from tensorrt_llm.parameter import cast_finite
from tensorrt_llm.quantization import QuantizedWeight, quantize_weight
from tensorrt_llm.quantization.layers import WeightOnlyLayout, WeightOnlyMatmul
from tensorrt_llm.quantization.quantize import pack_int4

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
    shares = _shares(config, mapping)
    for path, module in _weight_only_modules(model):
        _load_rounded(path, module, shares, checkpoint)
    _load_unquantized(model, shares, checkpoint, mapping)


def load_from_quantized(
    model: Module, checkpoint: QuantizedCheckpoint, config: QWenConfig, mapping: Mapping | None = None
) -> None:
    """As load_from_hf_qwen, from a quantized checkpoint into a model made by quantize_model with its layout.

    A lm_head that the checkpoint leaves alone may be weight-only INT8 in the model: it is rounded here.
    """
    mapping = mapping or Mapping()
    check_complete(checkpoint, config)
    shares = _shares(config, mapping)
    packed = {
        path: _PackedShare.of(share, checkpoint)
        for path, _ in _weight_only_modules(model)
        if (share := shares[f"{path}.weight"]).pieces[0].module in checkpoint.linears
    }
    read = {linear.name for packed_share in packed.values() for linear in packed_share.linears}
    assert read == checkpoint.linears.keys(), f"not in the model: {sorted(checkpoint.linears.keys() - read)}"
    for path, module in _weight_only_modules(model):
        if path in packed:
            packed[path].load_into(module)
        else:
            _load_rounded(path, module, shares, checkpoint.files)
    _load_unquantized(model, shares, checkpoint.files, mapping)


def load_dequantized(model: Module, checkpoint: QuantizedCheckpoint, config: QWenConfig) -> None:
    """Give an unquantized model the weights that a quantized checkpoint stands for, all on one rank."""
    check_complete(checkpoint, config)
    shares = _shares(config, Mapping())
    _load_unquantized(model, shares, checkpoint.files, Mapping())
    for name, parameter in model.named_parameters():
        if name.endswith(".weight") and shares[name].pieces[0].module in checkpoint.linears:
            parameter.set_loader(_PackedShare.of(shares[name], checkpoint).dequantized)


def _shares(config: QWenConfig, mapping: Mapping) -> dict[str, Share]:
    """What this rank holds of every parameter of the unquantized model."""
    return {name: split(sources, config, mapping) for name, (split, sources) in origins_of(config).items()}


def _weight_only_modules(model: Module) -> list[tuple[str, WeightOnlyMatmul]]:
    return [(path, module) for path, module in model.named_modules() if isinstance(module, WeightOnlyMatmul)]


def _load_unquantized(model: Module, shares: dict[str, Share], checkpoint: HfCheckpoint, mapping: Mapping) -> None:
    for name, parameter in model.named_parameters():
        if name not in shares or not is_floating(parameter.dtype):
            continue  # what quantization made of a weight
        share = shares[name]
        if share.shape != parameter.shape:
            raise ValueError(
                f"{name}: rank {mapping.tp_rank} of {mapping.tp_size} has {list(share.shape)}, "
                f"but the model was made for {list(parameter.shape)}"
            )
        parameter.set_loader(partial(share.read, checkpoint))


def _load_rounded(path: str, module: WeightOnlyMatmul, shares: dict[str, Share], checkpoint: HfCheckpoint) -> None:
    name = f"{path}.weight"
    module.set_loader(partial(_quantize, name, module, shares[name], checkpoint))


def _quantize(name: str, module: WeightOnlyMatmul, share: Share, checkpoint: HfCheckpoint) -> QuantizedWeight:
    """This rank's part of the quantized weight, equal to that part of the whole: rows are quantized at full length."""
    weight = cast_finite(share.whole_rows().read(checkpoint), module.dtype, name)
    quantized = quantize_weight(weight, module.bits, module.whole_group_size, positive_scales=module.positive_scales)
    return _columns_of_rank(quantized, share)


def _columns_of_rank(weight: QuantizedWeight, share: Share) -> QuantizedWeight:
    """Of whole rows the rank's columns."""
    return weight if share.columns is None else weight.columns(*share.columns)


@dataclass(frozen=True)
class _PackedShare:
    """What one rank holds of a weight whose HF tensors are quantized."""

    share: Share
    checkpoint: QuantizedCheckpoint
    linears: tuple[PackedLinear, ...]  # of the share's pieces

    @classmethod
    def of(cls, share: Share, checkpoint: QuantizedCheckpoint) -> "_PackedShare":
        """Layers that become one weight read one input: they must agree on the order of its columns."""
        first, *others = linears = tuple(checkpoint.linears[piece.module] for piece in share.pieces)
        for other in others:
            if not _equal(first.order, other.order):
                raise ValueError(
                    f"{checkpoint.files.directory}: the g_idx of {first.name} and {other.name} differ, expected one "
                    f"order: they are quantized with act-order but become one weight"
                )
            assert _equal(first.pre_quant_scale, other.pre_quant_scale), (first.name, other.name)
        if first.order is not None and share.columns not in (None, (0, first.shape[1])):
            raise ValueError(
                f"{checkpoint.files.directory}: {first.name} is quantized with act-order (g_idx), so its input cannot "
                f"be split over ranks, expected tp_size 1"
            )
        return cls(share, checkpoint, linears)

    def load_into(self, module: WeightOnlyMatmul) -> None:
        made_for = WeightOnlyLayout(
            module.bits,
            module.whole_group_size,
            zero=module.zero is not None,
            pre_quant_scale=module.pre_quant_scale is not None,
            act_order=module.order is not None,
        )
        assert made_for == self.checkpoint.layout, (made_for, self.checkpoint.layout)
        module.set_loader(self._weight)
        if module.order:
            module.order.set_loader(self._order)
        if module.pre_quant_scale:
            module.pre_quant_scale.set_loader(self._pre_quant_scale)

    def dequantized(self) -> torch.Tensor:
        """The float weight, columns in the order of the input; what multiplies the input multiplies the weight."""
        stored = self._weight().dequantize()
        first = self.linears[0]
        weight = stored
        if first.order is not None:
            weight = torch.empty_like(stored)
            weight[:, first.order.long()] = stored
        return weight if first.pre_quant_scale is None else weight * first.pre_quant_scale

    def _weight(self) -> QuantizedWeight:
        read_rows = self.checkpoint.read_rows
        rows = QuantizedWeight.stacked([read_rows(piece.module, *piece.rows) for piece in self.share.pieces])
        return _columns_of_rank(_with_zero_rows(rows, self.share.zero_rows), self.share)

    def _order(self) -> torch.Tensor:
        order = self.linears[0].order
        return torch.arange(self.share.shape[1], dtype=torch.int32) if order is None else order

    def _pre_quant_scale(self) -> torch.Tensor:
        scale = self.linears[0].pre_quant_scale
        assert scale is not None, self.linears[0].name
        start, stop = self.share.columns or (0, len(scale))
        return scale[start:stop]


def _with_zero_rows(weight: QuantizedWeight, count: int) -> QuantizedWeight:
    """The weight with `count` rows of zeros below it."""
    if not count:
        return weight
    zeros = torch.zeros((count, weight.shape[1]), dtype=torch.int8)
    scale = torch.ones((count, weight.scale.shape[1]))
    zero = None if weight.zero is None else torch.zeros(scale.shape, dtype=torch.int16)
    below = QuantizedWeight(weight.bits, pack_int4(zeros) if weight.bits == 4 else zeros, scale, zero)
    return QuantizedWeight.stacked([weight, below])


def _equal(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and torch.equal(a, b))


# Tensors that a checkpoint may hold and no parameter wants, and why that is right.
HARMLESS = (
    (r".*\.inv_freq", "RoPE frequencies follow from the config"),
    (r"transformer\.h\.\d+\.attn\.(masked_bias|logn_tensor)", "constants of the first releases' attention"),
)


def check_complete(checkpoint: HfCheckpoint | QuantizedCheckpoint, config: QWenConfig) -> None:
    """Prove from the headers that the checkpoint holds the tensors of `config`'s model, right in shape and dtype, and
    no others; whatever is wrong is listed in one ValueError."""
    files, packed = (checkpoint, None) if isinstance(checkpoint, HfCheckpoint) else (checkpoint.files, checkpoint)
    found = checkpoint.tensors()
    wanted: dict[str, Source] = {}
    dtypes: dict[str, tuple[str, ...]] = {}
    for parameter, (_, sources) in origins_of(config).items():
        for source in sources:
            wanted[source.name] = source
            dtypes[source.name] = _dtypes(parameter, source, packed)
    ignored = _ignored(found, wanted.keys(), config, packed)
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
        "of wrong dtype": (
            f"{name} is {found[name].dtype}, expected {' or '.join(dtypes[name])}"
            for name in both
            if found[name].dtype not in dtypes[name]
        ),
    }
    lists = [_list(what, names) for what, names in faults.items()]
    if any(lists):
        raise ValueError(
            f"{files.directory}: the tensors are not those of a {config.architecture} with this config.json: "
            + "; ".join(filter(None, lists))
        )
    if "lm_head.weight" in ignored:
        _check_tied(files, "lm_head.weight", origins_of(config)["vocab_embedding.weight"][1][0])
    for reason in sorted(set(ignored.values())):
        names = sorted(name for name in ignored if ignored[name] == reason)
        logger.info("not loaded, as %s: %s", reason, _cut(names))


def _dtypes(parameter: str, source: Source, packed: QuantizedCheckpoint | None) -> tuple[str, ...]:
    """What an HF tensor may be: of a quantized checkpoint every matrix of a layer is quantized, lm_head perhaps."""
    if packed is None or len(source.shape) == 1:
        return READABLE_DTYPES
    if source.name == "lm_head.weight":
        return (packed.dtype, *READABLE_DTYPES)
    return (packed.dtype,) if parameter.startswith("layers.") else READABLE_DTYPES


def _ignored(
    found: dict[str, TensorInfo], wanted: Collection[str], config: QWenConfig, packed: QuantizedCheckpoint | None
) -> dict[str, str]:
    """The tensors that nobody wants, and why that is right."""
    may_be_tied = config.tie_word_embeddings and not (packed and packed.quantizes_lm_head)
    harmless = HARMLESS + ((r"lm_head\.weight", "tied to the embedding, and equal"),) * may_be_tied
    left_over = found.keys() - wanted
    ignored = {name: reason for name in left_over for pattern, reason in harmless if re.fullmatch(pattern, name)}
    for name in left_over:
        module, _, kind = name.rpartition(".")
        if packed and kind == "bias" and module in packed.linears and not packed.files.read(name).any():
            ignored[name] = "a bias of zeros, which AutoGPTQ gives to every layer"
    return ignored


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
