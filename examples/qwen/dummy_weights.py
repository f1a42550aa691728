"""Random weights for a model of which only config.json is at hand: for measuring, and for trying limits."""

import zlib
from functools import partial

import torch

from tensorrt_llm import Module, Parameter
from tensorrt_llm.dtype import is_floating, torch_dtype
from tensorrt_llm.quantization.layers import WeightOnlyMatmul

# Like trained weights in scale: logits stay finite and differ from token to token.
_STANDARD_DEVIATION = 0.02
# Random numbers are made in float32 in pieces, so that a vocabulary does not need its size in float32 at once.
_PIECE = 1 << 24
# The standard deviation of integers drawn evenly from all that bits hold.
_INTEGER_DEVIATION = {8: 73.9, 4: 4.6}
# What is the same everywhere, by the last name of a parameter. An activation's scale lets it reach 4.
_CONSTANTS = {
    "per_channel_scale": _STANDARD_DEVIATION / _INTEGER_DEVIATION[8],
    "act_scale": 4 / 127,
    "smoother": 1.0,
    "pre_quant_scale": 1.0,
    "zero": 0,
}


def load_dummy_weights(model: Module, device: torch.device, seed: int = 0) -> None:
    """Give every parameter a loader of random data, made on `device`; norms are ones. Equal seeds give equal data."""
    for name, parameter in model.named_parameters():
        parameter.set_loader(partial(_random, name, parameter, device, seed))
    for _, module in model.named_modules():
        if isinstance(module, WeightOnlyMatmul):
            scale = torch.tensor(_STANDARD_DEVIATION / _INTEGER_DEVIATION[module.bits])
            if module.scale.shape[1] > 1:
                scale = scale.half()  # as quantizers leave those of groups, for kernels that hold them so
            module.scale.set_loader(partial(torch.full, module.scale.shape, scale.item(), device=device))


def _random(name: str, parameter: Parameter, device: torch.device, seed: int) -> torch.Tensor:
    data = torch.empty(parameter.shape, dtype=torch_dtype(parameter.dtype), device=device)
    if name.endswith(("ln_1.weight", "ln_2.weight", "ln_f.weight")):
        return data.fill_(1)
    kind = name.rpartition(".")[2]
    if kind in _CONSTANTS:
        return data.fill_(_CONSTANTS[kind])
    if kind == "order":
        return torch.arange(*parameter.shape, dtype=data.dtype, device=device)
    generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()) ^ seed)
    if not is_floating(parameter.dtype):
        limits = torch.iinfo(data.dtype)
        return data.random_(limits.min, limits.max + 1, generator=generator)
    for piece in data.view(-1).split(_PIECE):
        noise = torch.empty(piece.shape, dtype=torch.float32, device=device).normal_(generator=generator)
        piece.copy_(noise.mul_(_STANDARD_DEVIATION))
    return data
