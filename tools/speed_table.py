"""The speed of a Qwen-7B shape in every mode at every batch, beside the targets, in one run on one GPU.

    python3 tools/speed_table.py --output speed.json

Runs from a bare checkout. Engines are compiled in memory, from random weights made on the GPU, by what build.py runs;
requests, clocks and warm-up are those of benchmark.py. Decode tokens/s are medians of --repeats runs after one in full.
A dataset is served twice, and the second time counts: by then its kernels are compiled and its graphs captured. The
last thing printed is a table; figures so far are in the output file at any time.
"""

import gc
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples" / "qwen"
sys.path[:0] = [str(ROOT), str(EXAMPLES), str(ROOT / "tools")]

import torch  # noqa: E402
from backends import EngineBackend  # noqa: E402
from benchmarking.timing import Runs, measure, trace  # noqa: E402
from benchmarking.workload import Shape, Workload, equal_requests, read_entries, requests_of_lengths  # noqa: E402
from command_line import flag, log_level_flag, run_script  # noqa: E402
from compiling.args import BuildArgs  # noqa: E402
from compiling.weight_source import WeightSource  # noqa: E402
from measure_gpu import MODES as BUILD_FLAGS  # noqa: E402
from measure_gpu import MeasureArgs, describe_machine, write_shape  # noqa: E402
from table import markdown_table  # noqa: E402

from tensorrt_llm.runtime.session import pick_device  # noqa: E402

MODES: dict[str, dict[str, Any]] = {
    "fp16": BUILD_FLAGS["FP16"],
    "int8": BUILD_FLAGS["INT8 weights"],
    "w8a8": BUILD_FLAGS["SmoothQuant per token, per channel"],
    "int4": BUILD_FLAGS["INT4 weights g128"],
}
# Batch, prompt, output -> decode tokens/s that are wanted of each mode, on an H100.
TARGETS: dict[Shape, tuple[float, ...]] = {
    Shape(1, 128, 128): (195, 340, 340, 480),
    Shape(1, 1024, 128): (188, 318, 318, 430),
    Shape(8, 128, 128): (1350, 2100, 2100, 2600),
    Shape(32, 128, 128): (4500, 5800, 6000, 6200),
    Shape(64, 256, 64): (6600, 7900, 8500, 8200),
}
# Workload -> requests/s.
DATASETS: dict[str, tuple[float, ...]] = {
    "sharegpt_like_100_max1024": (15, 18.5, 20, 20),
    "sharegpt_like_1000_max1024": (33, 35, 38, 36),
}
VOCABULARY = 151936
MOST_REQUESTS = 256  # at a time


@dataclass(frozen=True)
class SpeedArgs:
    output: Path = flag(help="JSON file for all figures")
    modes: list[str] = flag(list(MODES), help="what to measure; with _kv8 behind the name over an int8 KV cache")
    datasets: list[str] = flag(list(DATASETS), help="datasets to serve")
    only_datasets: bool = flag(False, help="leave out batches of equal prompts")
    repeats: int = flag(2, help="counted runs of a shape")
    num_layers: int = flag(32, help="of the model")
    time_limit: float = flag(520.0, help="seconds after which no mode is begun")
    device: str | None = flag(None, help="cpu or cuda (default: cuda when there is one)")
    log_level: str = log_level_flag("warning")


Figures = dict[str, dict[str, float]]  # mode -> name of a row -> figure


def main(args: SpeedArgs) -> None:
    unknown = [mode for mode in args.modes if mode.removesuffix("_kv8") not in MODES]
    if unknown:
        raise ValueError(f"--modes has {', '.join(unknown)}, expected some of {', '.join(MODES)}, perhaps with _kv8")
    started = time.monotonic()
    device = pick_device(args.device)
    machine = describe_machine(device)
    figures: Figures = {}
    with TemporaryDirectory() as folder:
        shape_dir = Path(folder) / "shape"
        write_shape(MeasureArgs(output=args.output, num_layers=args.num_layers), shape_dir)
        for mode in args.modes:
            if time.monotonic() - started > args.time_limit:
                print(f"no time left for {mode} and what follows")
                break
            figures[mode] = {}
            for name, figure in measure_mode(args, mode, shape_dir, device):
                figures[mode][name] = figure
                print(f"{mode}, {name}: {figure:.2f}", flush=True)
                args.output.write_text(json.dumps({"machine": machine, "figures": figures}, indent=1) + "\n")
            gc.collect()  # a session and its graphs know each other
            if device.type == "cuda":
                torch.cuda.empty_cache()
    print(table(figures))
    print(" ".join(f"{key} {value};" for key, value in machine.items()))


def measure_mode(args: SpeedArgs, mode: str, shape_dir: Path, device: torch.device) -> Iterator[tuple[str, float]]:
    backend = open_backend(mode, shape_dir, device)
    for shape in () if args.only_datasets else TARGETS:
        found = measure(backend, equal_requests(shape, VOCABULARY, 0), shape.batch_size, Runs(1, args.repeats))
        assert found.decode_tokens_per_second is not None, "every shape asks for more than a token"
        yield row_name(shape), found.decode_tokens_per_second
        if shape.batch_size == 1:
            yield f"first token after {shape.input_len}, ms", 1e3 * (found.one_token_seconds or 0)
    workloads = {name: read_workload(name) for name in args.datasets}
    for name, workload in workloads.items():
        backend.warm_up(workload.prompts, workload.output_lens, MOST_REQUESTS)
        yield f"{name}, requests/s", len(workload.prompts) / trace(backend, workload, MOST_REQUESTS).seconds


def open_backend(mode: str, shape_dir: Path, device: torch.device) -> EngineBackend:
    flags = MODES[mode.removesuffix("_kv8")] | {"int8_kv_cache": mode.endswith("_kv8")}
    build = BuildArgs(
        hf_model_dir=shape_dir, output_dir=shape_dir / "none", dtype="float16", dummy_weights=True,
        max_batch_size=MOST_REQUESTS, max_input_len=1024, max_output_len=1024, device=str(device), **flags,
    )  # fmt: skip
    return EngineBackend(WeightSource.open(build).engine(0), mode, device)


def read_workload(name: str) -> Workload:
    path = EXAMPLES / "workloads" / f"{name}.json"
    return requests_of_lengths(path, read_entries(path), None, VOCABULARY, 0)


def row_name(shape: Shape) -> str:
    return f"batch {shape.batch_size}, {shape.input_len}/{shape.output_len}, tokens/s"


def table(figures: Figures) -> str:
    targets = {row_name(shape): wanted for shape, wanted in TARGETS.items()}
    targets |= {f"{name}, requests/s": wanted for name, wanted in DATASETS.items()}
    names = list(dict.fromkeys(name for found in figures.values() for name in found))
    cells = []
    for name in names:
        wanted = dict(zip(MODES, targets.get(name, ()), strict=False))
        cells.append((name, *(cell(figures[mode].get(name), wanted.get(mode)) for mode in figures)))
    return markdown_table(("measured (wanted)", *figures), cells)


def cell(found: float | None, wanted: float | None) -> str:
    if found is None:
        return "-"
    return f"{found:.1f}" if wanted is None else f"{found:.1f} ({wanted:g})"


if __name__ == "__main__":
    run_script(main, SpeedArgs, __doc__)
