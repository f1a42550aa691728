"""Measure how fast an engine and Hugging Face generate: random prompts of one length, answers of one length.

    python benchmark.py --backend both --engine_dir engines/7b --hf_model_dir Qwen-7B --batch_size 1 32

Every figure is made of medians. The time to the first token is that of a whole run that asks for one token; decode
tokens/s is batch size * (output_len - 1) over the time of a run less that. Memory is what torch allocated on the GPU at
its peak, weights and KV cache included. "ready" is the time from the start of the process to a first answer of two
tokens, kernels compiled: it is known for the backend that comes first, the engine if there is one.
"""

import gc
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

# A bare checkout works too, as on a GPU machine where nothing is installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402
from backends import DATA_TYPES, Backend, EngineBackend, HfBackend  # noqa: E402
from command_line import flag, log_level_flag, run_script  # noqa: E402
from table import markdown_table  # noqa: E402

from tensorrt_llm import Engine  # noqa: E402
from tensorrt_llm.runtime import SamplingConfig  # noqa: E402
from tensorrt_llm.runtime.session import pick_device  # noqa: E402


@dataclass(frozen=True)
class BenchmarkArgs:
    backend: str = flag("trt_llm", help="what to measure", choices=("trt_llm", "hf", "both"))
    engine_dir: Path | None = flag(None, help="folder that build.py wrote")
    hf_model_dir: Path | None = flag(None, help="folder of the Hugging Face checkpoint; no remote code is run")
    dummy_weights: bool = flag(False, help="random weights for Hugging Face; hf_model_dir needs only config.json")
    data_type: str = flag("fp16", help="dtype of the Hugging Face model", choices=tuple(DATA_TYPES))
    batch_size: list[int] = flag([1], help="prompts at a time; several values are several runs")
    input_len: list[int] = flag([128], help="tokens of a prompt, one value or one for each run")
    output_len: list[int] = flag([128], help="new tokens of a prompt, one value or one for each run")
    warm_up: int = flag(1, help="runs that are not counted, before those that are")
    repeats: int = flag(3, help="runs that are counted")
    seed: int = flag(0, help="of the random prompts")
    output_json: Path | None = flag(None, help="also write the table's figures to this file")
    device: str | None = flag(None, help="cpu or cuda (default: cuda when there is one)")
    log_level: str = log_level_flag("warning")

    def check(self) -> None:
        """Raise a ValueError for flags that are out of range or do not go together."""
        if self.output_json:
            self.output_json.parent.mkdir(parents=True, exist_ok=True)
        if self.backend != "hf" and self.engine_dir is None:
            raise ValueError(f"--engine_dir is missing, expected the folder of an engine for --backend {self.backend}")
        if self.backend != "trt_llm" and self.hf_model_dir is None:
            raise ValueError(f"--hf_model_dir is missing, expected a checkpoint's folder for --backend {self.backend}")
        if self.repeats < 1 or self.warm_up < 0:
            raise ValueError(f"--repeats is {self.repeats} and --warm_up {self.warm_up}, expected at least 1 and 0")
        self.shapes()

    def shapes(self) -> list["Shape"]:
        """The runs: lists side by side, a single value for all of them."""
        lists = {name: getattr(self, name) for name in Shape._fields}
        for name, values in lists.items():
            if min(values) < 1:
                raise ValueError(f"--{name} is {min(values)}, expected at least 1")
        count = max(map(len, lists.values()))
        for name, values in lists.items():
            if len(values) not in (1, count):
                raise ValueError(f"--{name} has {len(values)} values, expected 1, or {count} as the longest list has")
        columns = (values * count if len(values) == 1 else values for values in lists.values())
        return [Shape(*values) for values in zip(*columns, strict=True)]


class Shape(NamedTuple):
    """One run's batch."""

    batch_size: int
    input_len: int
    output_len: int


@dataclass(frozen=True)
class Figures:
    """What was measured of one backend with one shape."""

    name: str
    shape: Shape
    first_token_seconds: float
    total_seconds: float
    peak_device_bytes: int | None  # None: not a GPU
    ready_seconds: float | None  # None: not the first backend of the process

    @property
    def decode_tokens_per_second(self) -> float | None:
        seconds = self.total_seconds - self.first_token_seconds
        if self.shape.output_len == 1 or seconds <= 0:
            return None  # nothing was decoded, or less than the noise of the clock
        return self.shape.batch_size * (self.shape.output_len - 1) / seconds

    @property
    def tokens_per_second(self) -> float:
        """Of input and output together."""
        return self.shape.batch_size * (self.shape.input_len + self.shape.output_len) / self.total_seconds

    def record(self) -> dict[str, Any]:
        """Everything, for JSON."""
        derived = {
            "decode_tokens_per_second": self.decode_tokens_per_second,
            "tokens_per_second": self.tokens_per_second,
        }
        return asdict(self) | {"shape": self.shape._asdict()} | derived


# Title of a column -> its cell.
COLUMNS: dict[str, Callable[[Figures], str]] = {
    "backend": lambda row: row.name,
    "batch": lambda row: str(row.shape.batch_size),
    "in": lambda row: str(row.shape.input_len),
    "out": lambda row: str(row.shape.output_len),
    "first token, ms": lambda row: f"{1000 * row.first_token_seconds:.1f}",
    "decode tokens/s": lambda row: optional(row.decode_tokens_per_second, ".1f"),
    "in + out tokens/s": lambda row: f"{row.tokens_per_second:.1f}",
    "peak device memory, GiB": lambda row: optional(row.peak_device_bytes and row.peak_device_bytes / 2**30, ".2f"),
    "process start to ready, s": lambda row: optional(row.ready_seconds, ".1f"),
}


def optional(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


def main(args: BenchmarkArgs) -> None:
    args.check()
    device = pick_device(args.device)
    figures: list[Figures] = []
    for open_backend in openings(args, device):
        figures += measure_backend(open_backend, args, is_first=not figures)
    print(f"On {device_name(device)}, medians of {args.repeats} runs:\n")
    print(markdown_table(tuple(COLUMNS), [[show(row) for show in COLUMNS.values()] for row in figures]))
    if args.output_json:
        facts = {"device": device_name(device), "repeats": args.repeats}
        args.output_json.write_text(json.dumps(facts | {"runs": [row.record() for row in figures]}, indent=2) + "\n")


def openings(args: BenchmarkArgs, device: torch.device) -> list[Callable[[], Backend]]:
    """What opens each backend: one is gone before the next is there."""
    found: list[Callable[[], Backend]] = []
    if args.backend != "hf":
        assert args.engine_dir is not None, "check() refuses this"
        found.append(partial(open_engine, args.engine_dir, args.shapes(), device))
    if args.backend != "trt_llm":
        assert args.hf_model_dir is not None, "check() refuses this"
        found.append(partial(HfBackend, args.hf_model_dir, args.data_type, device, dummy_weights=args.dummy_weights))
    return found


def open_engine(engine_dir: Path, shapes: Sequence[Shape], device: torch.device) -> Backend:
    engine = Engine.from_dir(engine_dir)
    limits = engine.config.limits
    for shape in shapes:
        # More prompts would wait in a queue, and longer ones fail only when their turn comes.
        for name, found, most in (
            ("batch_size", shape.batch_size, limits.max_batch_size),
            ("input_len", shape.input_len, limits.max_input_len),
            ("input_len + output_len", shape.input_len + shape.output_len, limits.max_seq_len),
        ):
            if found > most:
                raise ValueError(f"--{name} is {found}, expected at most {most} as {engine_dir} was built")
    return EngineBackend(engine, f"trt_llm {engine.config.precision}", device)


def measure_backend(open_backend: Callable[[], Backend], args: BenchmarkArgs, is_first: bool) -> list[Figures]:
    """Open a backend, measure it with all shapes, and let go of its memory."""
    backend = open_backend()
    shapes = args.shapes()
    prompt = random_prompts(Shape(1, *shapes[0][1:]), backend.vocab_size, args.seed)
    backend.generate(prompt, asking_for(min(2, shapes[0].output_len)))
    ready_seconds = seconds_since_process_start() if is_first else None
    figures = []
    for shape in shapes:
        if backend.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(backend.device)
        prompts = random_prompts(shape, backend.vocab_size, args.seed)
        figures.append(
            Figures(
                name=backend.name,
                shape=shape,
                first_token_seconds=median_seconds(backend, prompts, 1, args),
                total_seconds=median_seconds(backend, prompts, shape.output_len, args),
                peak_device_bytes=peak_device_bytes(backend.device),
                ready_seconds=ready_seconds,
            )
        )
    del backend
    gc.collect()  # a session and its graphs know each other
    return figures


def random_prompts(shape: Shape, vocab_size: int, seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    ids: list[list[int]] = torch.randint(vocab_size, (shape.batch_size, shape.input_len), generator=generator).tolist()
    return ids


def asking_for(max_new_tokens: int) -> SamplingConfig:
    """Greedy, and nothing ends an answer before its length."""
    return SamplingConfig(max_new_tokens=max_new_tokens, end_id=None)


def median_seconds(backend: Backend, prompts: list[list[int]], output_len: int, args: BenchmarkArgs) -> float:
    seconds = [seconds_of_run(backend, prompts, output_len) for _ in range(args.warm_up + args.repeats)]
    return median(seconds[args.warm_up :])


def seconds_of_run(backend: Backend, prompts: list[list[int]], output_len: int) -> float:
    synchronize(backend.device)
    started = time.perf_counter()
    outputs = backend.generate(prompts, asking_for(output_len))
    synchronize(backend.device)
    seconds = time.perf_counter() - started
    assert all(len(ids) == output_len for ids in outputs), "a run that ended early measures something else"
    return seconds


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_device_bytes(device: torch.device) -> int | None:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def device_name(device: torch.device) -> str:
    return (
        torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device}, {torch.get_num_threads()} threads"
    )


def seconds_since_process_start() -> float:
    """From the start of this process as Linux counts it, so that loading Python and torch is in it."""
    # Field 22 of stat, in ticks since boot; the second field is a name in parentheses that may hold spaces.
    start_ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - start_ticks / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    run_script(main, BenchmarkArgs, __doc__)
