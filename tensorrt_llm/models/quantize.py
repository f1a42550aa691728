"""Turn a model into its quantized form: layers are replaced, weights come later. Knows no model family."""

from collections.abc import Iterable
from typing import Any

from ..layers import Attention, ColumnLinear, GatedMLP, RmsNorm, RowLinear
from ..module import Module
from ..quantization import QuantMode
from ..quantization.layers import (
    SmoothQuantAttention,
    SmoothQuantMLP,
    SmoothQuantRmsNorm,
    WeightOnlyLayout,
    WeightOnlyQuantLinear,
    WeightOnlyQuantRowLinear,
)

# What feeds a SmoothQuant layer must give int8: these norms of a decoder layer.
_SMOOTH_NORMS = ("ln_1", "ln_2")


def quantize_model(
    model: Any,
    quant_mode: QuantMode,
    *,
    group_size: int = 128,
    zero: bool = False,
    pre_quant_scale: bool = False,
    act_order: bool = False,
    positive_scales: bool = False,
    exclude_modules: Iterable[str] = ("lm_head",),
    quantize_lm_head: bool = False,
) -> Any:
    """Replace the layers of `model` as `quant_mode` says, in place; the model itself comes back.

    group_size, zero, pre_quant_scale, act_order and positive_scales describe weight-only groups (see
    quantization/layers.py). Modules whose last name is in `exclude_modules` keep their weights. With `quantize_lm_head`
    the output layer becomes weight-only INT8 per channel, whatever the mode of the layers. A group size that does not
    divide is a ValueError.
    """
    excluded = set(exclude_modules)
    if quant_mode.has_act_and_weight_quant():
        smooth_quantize(model, quant_mode)
    elif quant_mode.is_weight_only():
        layout = WeightOnlyLayout(
            bits=4 if quant_mode.is_int4_weight_only() else 8,
            group_size=group_size if quant_mode.has_per_group_scaling() else 0,
            zero=zero,
            pre_quant_scale=pre_quant_scale,
            act_order=act_order,
            positive_scales=positive_scales,
        )
        for path, linear in _linears(model):
            if path.rpartition(".")[2] not in excluded:
                _replace_weight_only(model, path, linear, layout)
    if quantize_lm_head:
        if model.lm_head.weight is model.vocab_embedding.weight:
            # The embedding keeps its weight; the output layer gets integers of its own.
            model.lm_head.weight = type(model.lm_head.weight)(model.lm_head.weight.shape, model.lm_head.weight.dtype)
        _replace_weight_only(model, "lm_head", model.lm_head, WeightOnlyLayout(bits=8))
    if quant_mode.has_int8_kv_cache():
        model.kv_dtype = "int8"
    model.quant_mode = quant_mode
    return model


def smooth_quantize(model: Any, quant_mode: QuantMode) -> Any:
    """Replace norms, attentions and MLPs of the layers of `model` by their SmoothQuant forms, in place."""
    for layer in model.layers:
        for name in _SMOOTH_NORMS:
            norm = getattr(layer, name)
            assert isinstance(norm, RmsNorm), f"{name} is a {type(norm).__name__}"
            setattr(layer, name, SmoothQuantRmsNorm(norm, quant_mode))
        for name, child in list(layer._modules.items()):
            if isinstance(child, Attention):
                setattr(layer, name, SmoothQuantAttention(child, quant_mode))
            elif isinstance(child, GatedMLP):
                setattr(layer, name, SmoothQuantMLP(child, quant_mode))
    return model


def _linears(model: Module) -> list[tuple[str, ColumnLinear | RowLinear]]:
    return [(path, module) for path, module in model.named_modules() if isinstance(module, ColumnLinear | RowLinear)]


def _replace_weight_only(model: Module, path: str, linear: ColumnLinear | RowLinear, layout: WeightOnlyLayout) -> None:
    parent_path, _, name = path.rpartition(".")
    parent = dict(model.named_modules())[parent_path]
    try:
        if isinstance(linear, RowLinear):
            setattr(parent, name, WeightOnlyQuantRowLinear(linear, layout))
        else:
            setattr(parent, name, WeightOnlyQuantLinear(linear, layout))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
