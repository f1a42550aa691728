"""Writes the folder of a quantized checkpoint: a shard per layer, config.json, and what came with the original.

The matrices of the layers are in four bits, everything else in one dtype. Knows no calibration; how integers lie is the
business of int4_packing.py.
"""

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from checkpoint.hf_checkpoint import HfCheckpoint
from checkpoint.weight_map import Source, origins_of
from safetensors.torch import save_file

from tensorrt_llm.dtype import itemsize
from tensorrt_llm.models.qwen.config import QWenConfig
from tensorrt_llm.parameter import cast_finite

from .calibrated_layers import QuantizedLinear
from .int4_packing import PER_WORD, Int4Format, Tensors

# What makes text of tokens, and answers of text, comes along as it is. Code does not.
_COPIED = (
    "generation_config.json",
    "qwen.tiktoken",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
# Qwen-1's config.json says the dtype so, beside torch_dtype.
_DTYPE_SWITCHES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def check_sizes(config: QWenConfig, group_size: int) -> None:
    """Refuse a model whose matrices the layouts cannot hold; group_size 0 is one group per output."""
    for source in _sources(config, quantized=True):
        outputs, inputs = source.shape
        if group_size and inputs % group_size:
            raise ValueError(
                f"{source.name}: has {inputs} inputs, expected a multiple of --group_size {group_size}; give a "
                f"divisor, or -1 for one group per output"
            )
        if inputs % PER_WORD or outputs % PER_WORD:
            raise ValueError(f"{source.name}: is {outputs} x {inputs}, expected multiples of {PER_WORD}")


def estimate_bytes(config: QWenConfig, group_size: int, dtype: str) -> int:
    """About what the shards take."""
    total = sum(math.prod(source.shape) * itemsize(dtype) for source in _sources(config, quantized=False))
    for source in _sources(config, quantized=True):
        elements = math.prod(source.shape)
        groups = elements // (group_size or source.shape[1])
        total += elements // 2 + groups * (itemsize(dtype) + 1)
    return total


def _sources(config: QWenConfig, quantized: bool) -> list[Source]:
    """The unquantized checkpoint's tensors that are quantized, the matrices of the layers; or all the others."""
    found = (
        source
        for parameter, (_, sources) in origins_of(config).items()
        for source in sources
        if (parameter.startswith("layers.") and len(source.shape) == 2) == quantized
    )
    return list(dict.fromkeys(found))  # a tied embedding is two parameters


class FolderWriter:
    """A folder in the making: every shard once, in any order, then `finish`."""

    def __init__(
        self, path: Path, checkpoint: HfCheckpoint, config: QWenConfig, dtype: str, layout: Int4Format
    ) -> None:
        self.path = path
        self._checkpoint = checkpoint  # what is not quantized comes from there
        self._dtype = dtype  # of everything but integers
        self._layout = layout
        self._num_shards = config.num_hidden_layers + 2
        self._config = config
        self._origins = {name: sources for name, (_, sources) in origins_of(config).items()}
        self._shard_of: dict[str, str] = {}  # by a tensor's name
        self.num_bytes = 0  # of all tensors

    def write_embedding(self) -> None:
        self._write_shard(1, {"vocab_embedding.weight": None})

    def write_layer(self, layer: int, made: Mapping[str, QuantizedLinear | torch.Tensor]) -> None:
        """`made` replaces parameters, by their names inside of the layer."""
        prefix = f"layers.{layer}."
        names = [name for name in self._origins if name.startswith(prefix)]
        assert made.keys() <= {name.removeprefix(prefix) for name in names}, made.keys()
        self._write_shard(2 + layer, {name: made.get(name.removeprefix(prefix)) for name in names})

    def write_output(self) -> None:
        self._write_shard(self._num_shards, {"ln_f.weight": None, "lm_head.weight": None})

    def finish(self) -> None:
        """Write what says what the shards are; the folder is complete."""
        matrices, others = ({source.name for source in _sources(self._config, flag)} for flag in (True, False))
        assert others <= self._shard_of.keys() and not matrices & self._shard_of.keys(), "a shard is missing or wrong"
        index = {"metadata": {"total_size": self.num_bytes}, "weight_map": self._shard_of}
        _write_json(self.path / "model.safetensors.index.json", index)
        original = self._checkpoint.directory
        config = json.loads((original / "config.json").read_text(encoding="utf-8"))
        switches = {switch: dtype == self._dtype for switch, dtype in _DTYPE_SWITCHES.items() if switch in config}
        named = {key: self._dtype for key in ("dtype", "torch_dtype") if key in config} or {"torch_dtype": self._dtype}
        changed = {**config, **switches, **named, "quantization_config": self._layout.quantization_config}
        _write_json(self.path / "config.json", changed)
        _write_json(self.path / self._layout.file, self._layout.facts)
        for name in _COPIED:
            if (original / name).is_file():
                shutil.copyfile(original / name, self.path / name)

    def _write_shard(self, number: int, parameters: Mapping[str, QuantizedLinear | torch.Tensor | None]) -> None:
        """None is for a parameter that stays as the checkpoint has it."""
        tensors: Tensors = {}
        for parameter, made in parameters.items():
            tensors |= self._read(parameter) if made is None else self._take(parameter, made)
        file = f"model-{number:05d}-of-{self._num_shards:05d}.safetensors"
        save_file(tensors, self.path / file, metadata={"format": "pt"})
        self._shard_of |= dict.fromkeys(tensors, file)
        self.num_bytes += sum(tensor.nbytes for tensor in tensors.values())

    def _read(self, parameter: str) -> Tensors:
        # A lm_head that is the embedding has been written.
        names = [source.name for source in self._origins[parameter] if source.name not in self._shard_of]
        return {name: cast_finite(self._checkpoint.read(name), self._dtype, name) for name in names}

    def _take(self, parameter: str, made: QuantizedLinear | torch.Tensor) -> Tensors:
        tensors: Tensors = {}
        start = 0
        for source in self._origins[parameter]:
            stop = start + source.shape[0]
            if isinstance(made, QuantizedLinear):
                module = source.name.removesuffix(".weight")
                packed = self._layout.pack(made.rows(start, stop))
                tensors |= {f"{module}.{kind}": tensor for kind, tensor in packed.items()}
            else:
                tensors[source.name] = made[start:stop]
            start = stop
        return {name: self._stored(name, tensor) for name, tensor in tensors.items()}

    def _stored(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """On the host, in a storage of its own."""
        stored = cast_finite(tensor, self._dtype, name) if tensor.is_floating_point() else tensor
        return stored.cpu().clone(memory_format=torch.contiguous_format)


def _write_json(file: Path, content: object) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
