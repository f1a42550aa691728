"""Hands the weights of an FT folder to a QWenForCausalLM, tensor by tensor, for one rank: weight.py's counterpart.

For SmoothQuant models the folder's integers and scales are taken as they are, for plain ones its storage-dtype weights,
and for weight-only ones these are quantized. Knows no file's shape or orientation: layout.py does.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from tensorrt_llm.mapping import Mapping
from tensorrt_llm.models import QWenForCausalLM
from tensorrt_llm.models.qwen.config import QWenConfig
from tensorrt_llm.module import Module
from tensorrt_llm.parameter import cast_finite
from tensorrt_llm.quantization import QuantizedWeight, QuantMode, quantize_weight
from tensorrt_llm.quantization.layers import (
    SmoothQuantLinear,
    SmoothQuantRmsNorm,
    SmoothQuantRowLinear,
    WeightOnlyMatmul,
)

from .folder import FtFolder
from .layout import ALWAYS, NORMS, QKV, ROW, SMOOTHED, UNQUANTIZED, UNSMOOTHED, member_of

# The linear layer whose calibrated input is the norm's output.
_READER_OF_NORM = {"ln_1": "attention.qkv", "ln_2": "mlp.fc"}


def load_from_ft(
    model: QWenForCausalLM, ft_dir: str | Path | FtFolder, config: QWenConfig, mapping: Mapping | None = None
) -> None:
    """Set a loader on every parameter of `model`, which is this rank's part, or the whole, of the folder's model.

    `ft_dir` is <tp_size>-gpu or the folder above it. An opened FtFolder may be of more ranks if the model is whole:
    their parts are joined. What the folder lacks for the model's quant_mode is a ValueError.
    """
    mapping = mapping or Mapping()
    folder = ft_dir if isinstance(ft_dir, FtFolder) else FtFolder.open(ft_dir, mapping.tp_size)
    assert mapping.tp_size in (1, folder.tp_size), (mapping.tp_size, folder.tp_size)
    folder.check(config, parts_for(folder, model.quant_mode))
    weights = _RankWeights(folder, mapping, model.quant_mode)
    modules = dict(model.named_modules())
    for path, module in modules.items():
        if isinstance(module, WeightOnlyMatmul):
            module.set_loader(partial(weights.quantized, path, module))
    for name, parameter in model.named_parameters():
        path, _, kind = name.rpartition(".")
        if not (isinstance(modules[path], WeightOnlyMatmul) and kind != "bias"):
            parameter.set_loader(weights.loader_of(path, kind, modules[path], parameter.shape))


def parts_for(folder: FtFolder, mode: QuantMode) -> tuple[str, ...]:
    """The parts of the folder that a model of this mode reads; a folder without them is a ValueError."""
    if mode.has_act_and_weight_quant():
        if folder.smoothquant is None:
            raise ValueError(
                f"{folder.path}: was converted without --smoothquant, so it has no int8 weights and no scales for "
                f"SmoothQuant; run hf_qwen_convert.py --smoothquant 0.5"
            )
        return (ALWAYS, SMOOTHED)
    if not folder.has_unquantized:
        raise ValueError(
            f"{folder.path}: was converted for SmoothQuant (--smoothquant {folder.smoothquant}) and holds no "
            f"unquantized weights; build with --use_smooth_quant, or convert with --keep_unquantized"
        )
    return (ALWAYS, UNQUANTIZED, *((UNSMOOTHED,) if folder.smoothquant is not None else ()))


@dataclass(frozen=True)
class _RankWeights:
    """The tensors of a folder as one rank of a model has them."""

    folder: FtFolder
    mapping: Mapping
    mode: QuantMode

    def loader_of(self, path: str, kind: str, module: Module, shape: tuple[int, ...]) -> Callable[[], torch.Tensor]:
        """What reads the parameter `kind` of the module at `path`."""
        member = member_of(path)
        # Q, K and V have a scale each in any mode.
        file_of_scale = "scale_w_quant_orig.bin"
        file_of_weight = "weight.int8.{r}.bin"
        if self.mode.has_per_channel_scaling():
            file_of_scale = "scale_w_quant_orig.col.bin" if member in ROW else "scale_w_quant_orig.col.{r}.bin"
            file_of_weight = "weight.int8.col.{r}.bin"
        if kind == "act_scale":
            return partial(self._act_scale, path)
        if kind == "smoother":
            return partial(self._read, path, "smoother.{r}.bin")
        if kind == "per_channel_scale":
            return partial(self._output_scale, path, file_of_scale, shape)
        if isinstance(module, SmoothQuantLinear | SmoothQuantRowLinear) and kind == "weight":
            return partial(self._read, path, file_of_weight)
        if isinstance(module, SmoothQuantRmsNorm):
            return partial(self._read, path, "weight.bin")
        return partial(self._read, path, self._unquantized_file(path, kind))

    def quantized(self, path: str, module: WeightOnlyMatmul) -> QuantizedWeight:
        """The rank's part of a quantized weight, equal to that part of the whole: rows are quantized at full length."""
        file = self._unquantized_file(path, "weight")
        splits_columns = member_of(path) in ROW
        weight = self.folder.read(path, file) if splits_columns else self._read(path, file)
        weight = cast_finite(weight, module.dtype, f"{path}.weight")
        quantized = quantize_weight(
            weight, module.bits, module.whole_group_size, positive_scales=module.positive_scales
        )
        if not splits_columns:
            return quantized
        count = weight.shape[1] // self.mapping.tp_size
        return quantized.columns(self.mapping.tp_rank * count, (self.mapping.tp_rank + 1) * count)

    def _read(self, path: str, file: str) -> torch.Tensor:
        if self.mapping.tp_size == 1:
            return self.folder.read(path, file)
        return self.folder.read_of_rank(path, file, self.mapping.tp_rank)

    def _unquantized_file(self, path: str, kind: str) -> str:
        """The parameter as the checkpoint had it."""
        member = member_of(path)
        if member in NORMS and self.folder.smoothquant is not None:
            return "unsmoothed.weight.bin"
        return f"{kind}.bin" if member in NORMS or member == path else f"{kind}.{{r}}.bin"

    def _output_scale(self, path: str, file: str, shape: tuple[int, ...]) -> torch.Tensor:
        """One for each output; a file may hold one for all. Ranks share the outputs of row-parallel layers."""
        is_shared = member_of(path) in ROW or not (self.mode.has_per_channel_scaling() or member_of(path) in QKV)
        scale = self.folder.read(path, file) if is_shared else self._read(path, file)
        return scale.expand(shape)

    def _act_scale(self, path: str) -> torch.Tensor:
        """[1]: the static scale of a norm's result, or of a linear layer's input."""
        layer, _, name = path.rpartition(".")
        reader = f"{layer}.{_READER_OF_NORM[name]}" if name in NORMS else path
        return 1 / self.folder.read(reader, "scale_x_orig_quant.bin")
