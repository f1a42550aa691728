"""Linear layers in an AWQ state dict (.pt) of ammo: rounded weights were never stored, only what to round.

    y = (x * input_quantizer._pre_quant_scale) (q * scale)
    q = round(weight / scale) in -8..7, scale = weight_quantizer._amax / 8

weight [n, k] is already divided by the pre_quant_scale [k]. Its elements divided by those of _amax are the group size.
The q, k and v of a Qwen2 layer read one input: where their pre_quant_scales differ they get the mean, and each weight
is scaled over to it and gets new scales.
"""

import math
from functools import partial

import torch

from tensorrt_llm.parameter import cast_finite

from .hf_checkpoint import READABLE_DTYPES, HfCheckpoint
from .packed_linear import SCALES, Headers, PackedLinear, StoredRows

_BITS = 4
_AMAX = "weight_quantizer._amax"
_PRE_QUANT_SCALE = "input_quantizer._pre_quant_scale"
_JOINED = ("q_proj", "k_proj", "v_proj")


def is_ammo(files: HfCheckpoint) -> bool:
    return any(name.endswith(f".{_AMAX}") for name in files.tensors())


def read_ammo(files: HfCheckpoint) -> tuple[str, list[PackedLinear]]:
    """The name of the algorithm and the layers, from headers and pre_quant_scales."""
    headers = Headers(files)
    groups = {name: _groups(headers, name) for name in headers.modules(_AMAX)}
    scales = {name: _pre_quant_scale(files, headers, name) for name in groups}
    # A layer of one group does not tell groups from rows; one of several does.
    is_grouped = any(count > 1 for count in groups.values())
    return "W4A16_AWQ", [_linear(files, headers, name, count, is_grouped, scales) for name, count in groups.items()]


def _groups(headers: Headers, name: str) -> int:
    """How many groups a row has."""
    rows, columns = headers.matrix(f"{name}.weight", READABLE_DTYPES, "the weight of a quantized layer")
    amax = headers.infos[f"{name}.{_AMAX}"]
    groups, rest = divmod(math.prod(amax.shape), rows)
    if amax.dtype not in SCALES or rest or not groups or columns % groups:
        raise ValueError(
            f"{amax.file}: {name}.{_AMAX} is {amax.dtype} {list(amax.shape)}, expected a float per group of each of "
            f"{rows} rows of {columns} columns"
        )
    return groups


def _pre_quant_scale(files: HfCheckpoint, headers: Headers, name: str) -> torch.Tensor:
    _, columns = headers.infos[f"{name}.weight"].shape
    full_name = f"{name}.{_PRE_QUANT_SCALE}"
    if full_name not in headers.infos:
        return torch.ones(columns)
    scale = files.read(full_name).float().flatten()
    if len(scale) != columns:
        raise ValueError(f"{full_name}: has {len(scale)} elements, expected {columns}, one per input of {name}")
    if not (scale.isfinite() & (scale != 0)).all():
        raise ValueError(f"{full_name}: holds zero, NaN or infinite values, expected finite numbers other than zero")
    return scale


def _linear(
    files: HfCheckpoint, headers: Headers, name: str, groups: int, is_grouped: bool, scales: dict[str, torch.Tensor]
) -> PackedLinear:
    rows, columns = headers.infos[f"{name}.weight"].shape
    parent, _, last = name.rpartition(".")
    siblings = [f"{parent}.{other}" for other in _JOINED] if last in _JOINED else [name]
    joined = torch.stack([scales[sibling] for sibling in siblings if sibling in scales])
    mean = joined.mean(0)
    factor = None if (joined == joined[0]).all() else scales[name] / mean
    tensors = (f"{name}.{kind}" for kind in ("weight", _AMAX, _PRE_QUANT_SCALE))
    return PackedLinear(
        name=name,
        shape=(rows, columns),
        bits=_BITS,
        group_size=columns // groups if is_grouped else 0,
        tensors=tuple(tensor for tensor in tensors if tensor in headers.infos),
        scales=f"{name}.{_AMAX}",
        read=partial(_read, files, name, (rows, groups), factor),
        pre_quant_scale=joined[0] if factor is None else mean,
    )


def _read(
    files: HfCheckpoint, name: str, rows_and_groups: tuple[int, int], factor: torch.Tensor | None, start: int, stop: int
) -> StoredRows:
    weight = cast_finite(files.read_rows(f"{name}.weight", start, stop), "float32", f"{name}.weight")
    if factor is None:
        amax = files.read(f"{name}.{_AMAX}").float().reshape(rows_and_groups)[start:stop]
        groups = weight.unflatten(1, (rows_and_groups[1], -1))
    else:
        groups = (weight * factor).unflatten(1, (rows_and_groups[1], -1))
        amax = groups.abs().amax(-1)
    scale = amax / 8
    q = (groups / scale[..., None]).round().clamp(-8, 7)
    return StoredRows((q + 8).to(torch.uint8).flatten(1), scale)
