"""Random weights for a model of which only config.json is at hand: for measuring, and for trying limits."""

import zlib
from functools import partial

import torch

from tensorrt_llm import Module, Parameter
from tensorrt_llm.dtype import torch_dtype

# Like trained weights in scale: logits stay finite and differ from token to token.
_STANDARD_DEVIATION = 0.02
# Random numbers are made in float32 in pieces, so that a vocabulary does not need its size in float32 at once.
_PIECE = 1 << 24


def load_dummy_weights(model: Module, device: torch.device, seed: int = 0) -> None:
    """Give every parameter a loader of random data, made on `device`; norms are ones. Equal seeds give equal data."""
    for name, parameter in model.named_parameters():
        parameter.set_loader(partial(_random, name, parameter, device, seed))


def _random(name: str, parameter: Parameter, device: torch.device, seed: int) -> torch.Tensor:
    data = torch.empty(parameter.shape, dtype=torch_dtype(parameter.dtype), device=device)
    if name.endswith(("ln_1.weight", "ln_2.weight", "ln_f.weight")):
        return data.fill_(1)
    generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()) ^ seed)
    for piece in data.view(-1).split(_PIECE):
        noise = torch.empty(piece.shape, dtype=torch.float32, device=device).normal_(generator=generator)
        piece.copy_(noise.mul_(_STANDARD_DEVIATION))
    return data
