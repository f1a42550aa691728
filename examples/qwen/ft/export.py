"""Fills an FT folder from a Hugging Face checkpoint, layer by layer. Knows no flag.

A layer at a time is read, smoothed, quantized and written, right after calibration has gone through it: the host holds
the weights of one group of linear layers, and the activations of the calibration text.
"""

from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from checkpoint.hf_checkpoint import HfCheckpoint
from checkpoint.weight_map import origins_of

from tensorrt_llm import Mapping
from tensorrt_llm.dtype import torch_dtype
from tensorrt_llm.quantization.calibrate import Observation
from tensorrt_llm.quantization.smooth_quant import (
    Int8Linear,
    fold_into_norm,
    quantize_linear,
    search_alpha,
    smoothing_factors,
)

from .folder import FtFolder
from .layout import LINEARS, NORMS, QKV, ROW

# Linear layers that read the same input and so are smoothed together, and the norm in front of them. Without one the
# input is divided at run time, by the "smoother".
GROUPS = (
    ("ln_1", ("attention.qkv",)),
    (None, ("attention.dense",)),
    ("ln_2", ("mlp.fc", "mlp.gate")),
    (None, ("mlp.proj",)),
)

Observed = dict[str, Observation]


@dataclass(frozen=True)
class FtExport:
    """One conversion. `alpha` is for folders with int8 weights; None searches it for each group of each layer."""

    checkpoint: HfCheckpoint
    folder: FtFolder
    alpha: float | None
    device: torch.device  # where int8 weights are made

    def write(self, observed: Iterable[Observed | None], layers_at_once: int) -> list[dict[str, float]]:
        """Write all tensors; of each layer the alpha of every group, by the first of its linear layers.

        `observed` gives each layer's turn, with what calibration saw of it, if it ran.
        """
        self._copy("vocab_embedding")
        alphas: list[dict[str, float]] = []
        with ThreadPoolExecutor(layers_at_once) as pool:
            waiting: deque[Future[dict[str, float]]] = deque()
            try:
                for layer, seen in enumerate(observed):
                    waiting.append(pool.submit(self._write_layer, layer, seen))
                    while len(waiting) >= layers_at_once:
                        alphas.append(waiting.popleft().result())
                alphas += [future.result() for future in waiting]
            finally:
                pool.shutdown(cancel_futures=True)
        for path in ("ln_f", *(() if self.folder.config.tie_word_embeddings else ("lm_head",))):
            self._copy(path)
        return alphas

    def _write_layer(self, layer: int, seen: Observed | None) -> dict[str, float]:
        prefix = f"layers.{layer}"
        is_smoothed = self.folder.smoothquant is not None
        for name in QKV:
            self.folder.write(f"{prefix}.{name}", "bias.{r}.bin", self._whole(f"{prefix}.{name}.bias"))
            if seen and self.folder.has_kv_scale and not is_smoothed:
                scale = torch.tensor([(seen[name].output_amax or 1.0) / 127])
                self.folder.write(f"{prefix}.{name}", "scale_y_quant_orig.bin", scale)
        if self.folder.has_unquantized:
            for name in LINEARS:
                self.folder.write(f"{prefix}.{name}", "weight.{r}.bin", self._whole(f"{prefix}.{name}.weight"))
            for name in NORMS:
                self._copy(f"{prefix}.{name}", "unsmoothed.weight.bin" if is_smoothed else "weight.bin")
        if not is_smoothed:
            return {}
        assert seen, "smoothing takes a calibration"
        with torch.inference_mode():
            return {members[0]: self._write_group(prefix, norm, members, seen) for norm, members in GROUPS}

    def _write_group(self, prefix: str, norm: str | None, members: tuple[str, ...], seen: Observed) -> float:
        """Smooth and quantize the linear layers `members`; the alpha that they were smoothed with."""
        weights = [self._whole(f"{prefix}.{name}.weight").to(self.device).float() for name in members]
        input_amax = seen[members[0]].input_amax.to(self.device)
        alpha = self.alpha
        if alpha is None:
            alpha = search_alpha(input_amax, seen[members[0]].input_rows.to(self.device), weights)
        factors = smoothing_factors(input_amax, weights, alpha)
        if norm:
            whole = self._whole(f"{prefix}.{norm}.weight").to(self.device).float()
            stored, factors = fold_into_norm(whole, factors, torch_dtype(self.folder.storage_dtype))
            self.folder.write(f"{prefix}.{norm}", "weight.bin", stored)
        for name, weight in zip(members, weights, strict=True):
            if name in ROW:
                self.folder.write(f"{prefix}.{name}", "smoother.{r}.bin", factors)
            largest_input = (input_amax / factors).amax().item()
            rows = self._block_rows(name, len(weight))
            int8 = quantize_linear(weight * factors, rows, largest_input, seen[name].output_amax)
            self._write_int8(f"{prefix}.{name}", name, int8)
        return alpha

    def _block_rows(self, name: str, rows: int) -> tuple[int, ...]:
        """The rows that share the one scale of "per tensor": Q, K and V have one each."""
        if name not in QKV:
            return (rows,)
        config = self.folder.config
        q, kv = (heads * config.head_size for heads in (config.num_attention_heads, config.num_key_value_heads))
        return (q, kv, kv)

    def _write_int8(self, path: str, name: str, int8: Int8Linear) -> None:
        per_block = slice(None) if name in QKV else slice(1)
        col = ".col.bin" if name in ROW else ".col.{r}.bin"
        tensors = {
            "weight.int8.{r}.bin": int8.per_block.weight,
            "weight.int8.col.{r}.bin": int8.per_channel.weight,
            "scale_x_orig_quant.bin": torch.tensor([int8.x_orig_quant]),
            "scale_y_quant_orig.bin": torch.tensor([int8.y_quant_orig]),
            "scale_w_quant_orig.bin": int8.per_block.scale[per_block],
            "scale_y_accum_quant.bin": int8.y_accum_quant(int8.per_block)[per_block],
            f"scale_w_quant_orig{col}": int8.per_channel.scale,
            f"scale_y_accum_quant{col}": int8.y_accum_quant(int8.per_channel),
        }
        for file, tensor in tensors.items():
            self.folder.write(path, file, tensor)

    def _copy(self, path: str, file: str = "weight.bin") -> None:
        self.folder.write(path, file, self._whole(f"{path}.weight"))

    def _whole(self, parameter: str) -> torch.Tensor:
        """A parameter of the whole model."""
        split, sources = origins_of(self.folder.config)[parameter]
        return split(sources, self.folder.config, Mapping()).read(self.checkpoint)
