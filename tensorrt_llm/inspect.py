"""What an engine file says of itself, for a person or as JSON.

    python -m tensorrt_llm.inspect engines/7b
    python -m tensorrt_llm.inspect engines/7b/qwen_float16_tp1_rank0.engine --plan

Opening an engine checks all of it: what is printed here has passed. Knows no kernel and no device.
"""

import argparse
import json
import signal
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from .engine import Engine, EngineConfig
from .engine_file import EngineFile
from .plan import Plan, TensorSpec
from .quantization.mode import QuantMode
from .timings import GpuTimings, MatmulTiming, read_timings

_COMMAND = "python -m tensorrt_llm.inspect"
# The dtypes that quantized weights are stored in; int4 lies two to a byte.
_BITS_STORED = {"int8": 8, "uint8": 4}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog=_COMMAND, description="Show what an engine is, and check that it is whole.")
    parser.add_argument("engine", type=Path, help="an engine file, or the folder that build.py wrote")
    parser.add_argument("--plan", action="store_true", help="also show the network, node by node")
    parser.add_argument("--json", action="store_true", help="everything as one JSON object")
    args = parser.parse_args(argv)
    try:
        files, engine = open_files(args.engine)
        timings = read_timings(files[0].path.parent)
    except ValueError as error:
        print(f"{_COMMAND}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    if args.json:
        plan = {"plan": engine.plan.to_dict()} if args.plan else {}
        print(json.dumps(facts_of(engine, files, timings) | plan, indent=2))
    else:
        print(describe(engine, files, timings))
        if args.plan:
            print(f"\n{engine.plan}")
    return 0


def open_files(path: Path) -> tuple[list[EngineFile], Engine]:
    """Check the file, or the files of all ranks of a folder; the engine that is shown is that of the first."""
    if not path.is_dir():
        file = EngineFile(path)
        return [file], Engine.of_file(file)
    files = [EngineFile.of_folder(path)]
    first = Engine.from_dir(path, opened=files[0])
    for rank in range(1, first.config.world_size):
        files.append(EngineFile.of_folder(path, rank))
        Engine.from_dir(path, rank, opened=files[rank])
    return files, first


def is_quantized(config: EngineConfig) -> bool:
    return bool(config.quant_mode or config.quant_algo)


def accuracy_of(config: EngineConfig) -> str:
    """The verdict on an engine in one line, or why there is none."""
    if config.verdict:
        return str(config.verdict)
    return "not measured" if is_quantized(config) else "not quantized"


def quant_mode_names(config: EngineConfig) -> list[str]:
    return [str(bit.name) for bit in QuantMode(config.quant_mode)]


@dataclass(frozen=True)
class WeightKind:
    """Weights of one name but for the layer's number, one dtype and one shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    bits: int | None  # of a quantized matrix; None for all else
    group_size: int | None  # columns that share a scale; None where all columns of a row do
    count: int = 1

    @property
    def num_bytes(self) -> int:
        """Of all of them."""
        return self.count * TensorSpec(self.name, self.dtype, self.shape).num_bytes

    @property
    def meaning(self) -> str:
        if self.bits is None:
            return ""
        return f"int{self.bits}, " + (f"groups of {self.group_size}" if self.group_size else "a scale per row")


def weight_kinds(plan: Plan) -> list[WeightKind]:
    """In the order of the first weight of each kind."""
    formats = quantized_formats(plan)
    kinds: dict[WeightKind, int] = {}
    for spec in plan.weights:
        name = ".".join("*" if part.isdecimal() else part for part in spec.name.split("."))
        shape = tuple(int(dim) for dim in spec.shape)
        kind = WeightKind(name, spec.dtype, shape, *formats.get(spec.name, (None, None)))
        kinds[kind] = kinds.get(kind, 0) + 1
    return [replace(kind, count=count) for kind, count in kinds.items()]


def quantized_formats(plan: Plan) -> dict[str, tuple[int, int | None]]:
    """Quantized matrix -> its bits, and the columns of a group (None: a scale is that of a row).

    Every op that reads a quantized matrix reads its scale right after it.
    """
    weights = {spec.name: spec for spec in plan.weights}
    formats: dict[str, tuple[int, int | None]] = {}
    for node in plan.nodes:
        for name, next_name in pairwise(node.inputs):
            matrix, scale = weights.get(name), weights.get(next_name)
            if matrix and scale and matrix.dtype in _BITS_STORED and len(matrix.shape) == 2:
                bits = _BITS_STORED[matrix.dtype]
                columns = int(matrix.shape[1]) * 8 // bits
                groups = int(scale.shape[1]) if len(scale.shape) == 2 else 1
                formats[name] = (bits, columns // groups if groups > 1 else None)
    return formats


def group_sizes(plan: Plan) -> list[int]:
    """The sizes of groups that matrices of the plan are quantized in."""
    return sorted({size for _, size in quantized_formats(plan).values() if size})


def facts_of(engine: Engine, files: Sequence[EngineFile], timings: Mapping[str, GpuTimings]) -> dict[str, Any]:
    """All that is known, for JSON."""
    return {
        "files": [
            {"path": str(file.path), "num_bytes": file.num_bytes, "header_sha256": file.header_sha256} for file in files
        ],
        "config": asdict(engine.config),
        "quant_mode_names": quant_mode_names(engine.config),
        "accuracy": accuracy_of(engine.config),
        "weight_bytes": engine.weight_bytes,
        "weights": [asdict(kind) | {"num_bytes": kind.num_bytes} for kind in weight_kinds(engine.plan)],
        "nodes": _node_counts(engine.plan),
        "tactics": {gpu: section.to_dict() for gpu, section in timings.items()},
    }


def describe(engine: Engine, files: Sequence[EngineFile], timings: Mapping[str, GpuTimings]) -> str:
    """The same for a person."""
    config, limits = engine.config, engine.config.limits
    features = [name for name, has in (("dynamic NTK", config.use_dynamic_ntk), ("log-n", config.use_logn_attn)) if has]
    mode = " | ".join(quant_mode_names(config)) or "none"
    sections = {
        "Engine": [f"{file.path}: {file.num_bytes:,} bytes, header SHA-256 {file.header_sha256}" for file in files]
        + [f"whole: the header and all {len(engine.plan.weights)} weights have the SHA-256 that the file states"],
        "Model": [
            f"{config.architecture}: {config.num_layers} layers of width {config.hidden_size}, {config.num_heads} "
            f"heads of {config.head_size} ({config.num_kv_heads} of keys and values), gated MLP of "
            f"{config.inter_size} ({config.hidden_act}), vocabulary {config.vocab_size}",
            f"trained on {config.seq_length} tokens; "
            + ", ".join([f"RoPE to the base {config.rotary_base:g}", *features]),
        ],
        "Limits": [
            f"{limits.max_batch_size} sequences, {limits.max_input_len} tokens in, {limits.max_output_len} out, "
            f"{limits.max_num_tokens} in a step; KV blocks of {limits.tokens_per_block} tokens"
        ],
        "Ranks": [f"rank {config.rank} of {config.world_size} (tp_size {config.tp_size}, pp_size {config.pp_size})"],
        "Made as": [
            f"{config.precision}, {config.quant_algo or 'no quantized weights'}, "
            f"quant_mode {config.quant_mode} ({mode})",
            f"KV cache {config.kv_dtype}, {config.kv_bytes_per_token:,} bytes a token",
            *(["batch-invariant: on CUDA a sequence has the same bits in any batch"] if config.batch_invariant else []),
        ],
        "Accuracy": [accuracy_of(config), *_worst_layers(config)],
        "Weights": [f"{engine.weight_bytes:,} bytes", *_weight_table(engine.plan)],
        "Nodes": [str(len(engine.plan.nodes)), *_node_table(engine.plan)],
        "Tactics": [line for gpu, section in timings.items() for line in _tactic_lines(gpu, section)]
        or ["not timed, heuristics choose: build.py --tune"],
    }
    return "\n".join(
        f"{title if index == 0 else '':<10}{line}"
        for title, lines in sections.items()
        for index, line in enumerate(lines)
    )


def _tactic_lines(gpu: str, section: GpuTimings) -> list[str]:
    """What is taken on a GPU, and the best that was not."""
    table = _columns([_tactic_cells(timing) for timing in section.timings])
    return [f"{gpu}: {len(section.timings)} timed with {section.software}", *table]


def _tactic_cells(timing: MatmulTiming) -> list[str]:
    rival = timing.best_rival
    return [
        f"{timing.op} {timing.rows} x {timing.depth}",
        f"{timing.tokens} tokens",
        f"{timing.winner}" + ("" if timing.winner == timing.heuristic else f" (for {timing.heuristic})"),
        f"{timing.microseconds[timing.winner]:.1f} us",
        f"{timing.bytes_per_second / 1e9:.0f} GB/s",
        f"before {rival}, {timing.microseconds[rival]:.1f} us" if rival else "",
    ]


def _worst_layers(config: EngineConfig) -> list[str]:
    layers = config.verdict.worst_layers if config.verdict else ()
    return _columns([[layer.layer, f"relative error {layer.relative_error:.2%}"] for layer in layers])


def _node_counts(plan: Plan) -> dict[str, int]:
    return dict(Counter(node.op for node in plan.nodes))


def _node_table(plan: Plan) -> list[str]:
    return _columns([[f"{count} x", op] for op, count in _node_counts(plan).items()])


def _weight_table(plan: Plan) -> list[str]:
    rows = [
        [
            f"{kind.count} x",
            kind.name,
            f"{kind.dtype}{list(kind.shape)}",
            f"{kind.num_bytes:,} bytes",
            kind.meaning,
        ]
        for kind in weight_kinds(plan)
    ]
    return _columns(rows)


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


if __name__ == "__main__":
    # A reader that has seen enough (`| head`) ends this process instead of giving it an error to show.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    sys.exit(main())
