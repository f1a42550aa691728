"""Measure how fast engines and Hugging Face serve the same requests: one table, JSON, Markdown and charts.

    python benchmark.py --backend both --engine_dir engines/7b --hf_model_dir Qwen-7B --batch_size 1 32
    python benchmark.py --backend both --engine_dir engines/fp16 engines/int8 --hf_model_dir Qwen-7B \\
        --dataset workloads/sharegpt_like_100_max1024.json --hf_max_batch_size 16 32 --output_chart speed

Without --dataset, a run is a batch of equal prompts of random ids. With it, all requests of the dataset are there at
once, and each gets as many tokens as the dataset says: an engine serves them with in-flight batching, Hugging Face in
padded batches of --hf_max_batch_size in their order. A dataset is a file of lengths, as in workloads/, or ShareGPT.
Everything is greedy, and no id ends an answer.

Figures are medians of whole runs after a warm-up. An engine warms up by the same run in full, so that no kernel is
compiled and no graph captured while the clock runs; Hugging Face by the first batch. The time to the first token counts
from the submission of all requests; between tokens is the time between two tokens of one request. Decode tokens/s are
all tokens but the first of each request, over the time of a run less that of a run that asks for one token each. With
equal prompts their share of the memory roofline compares them with a device that does nothing but read, at the rate
measured at the end, what each step needs: weights and cached keys and values.

Memory is what torch allocated on the GPU at its peak, weights and KV cache included. "ready" is the time from the start
of the process to a first answer of two tokens, kernels compiled, less the time in which all engines were checked and
requests made: it is known for the backend that comes first, the engine if there is one.
"""

import gc
import logging
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

# A bare checkout works too, as on a GPU machine where nothing is installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402
from backends import Backend, EngineBackend, HfBackend  # noqa: E402
from benchmarking.args import BenchmarkArgs  # noqa: E402
from benchmarking.chart import write_charts  # noqa: E402
from benchmarking.figures import Figures  # noqa: E402
from benchmarking.read_rate import measure_read_rate  # noqa: E402
from benchmarking.report import Report  # noqa: E402
from benchmarking.timing import Runs, measure  # noqa: E402
from benchmarking.workload import (  # noqa: E402
    SharegptLimits,
    Workload,
    equal_requests,
    is_sharegpt,
    read_entries,
    requests_of_lengths,
    requests_of_sharegpt,
)
from command_line import run_script  # noqa: E402
from process_age import seconds_since_process_start  # noqa: E402
from summary.engine_folders import EngineFolder, find_engines  # noqa: E402

from tensorrt_llm.models import QWenConfig  # noqa: E402
from tensorrt_llm.runtime.engine_folder import open_engine  # noqa: E402
from tensorrt_llm.runtime.session import pick_device  # noqa: E402
from tensorrt_llm.tokenizer import load_tokenizer  # noqa: E402

logger = logging.getLogger("benchmark")


@dataclass(frozen=True)
class Candidate:
    """A backend to be measured."""

    open: Callable[[], Backend]
    cases: list[tuple[Workload, int]]  # what it serves, and how many requests at a time
    repeats: int


def main(args: BenchmarkArgs) -> None:
    args.check()
    report = Report.read_json(args.from_json) if args.from_json else measure_all(args)
    print(report.text())
    if args.output_json:
        report.write_json(args.output_json)
    if args.output_markdown:
        args.output_markdown.write_text(report.text() + "\n", encoding="utf-8")
    if args.output_chart:
        write_charts(args.output_chart, report.rows, f"Throughput on {report.facts['device']}")


def measure_all(args: BenchmarkArgs) -> Report:
    """Open each backend, measure it with everything, and let go of it before the next."""
    device = pick_device(args.device)
    started = time.perf_counter()
    candidates = plan_measurement(args, device)
    planning_seconds = time.perf_counter() - started
    report = Report(describe(args, device), ())
    for candidate in candidates:
        rows = measure_candidate(candidate, args.warm_up, None if report.rows else planning_seconds)
        report = replace(report, rows=(*report.rows, *rows))
        if args.output_json:
            report.write_json(args.output_json)  # a run may be ended from outside
    if not report.rows:
        raise ValueError("the device has too little memory for any of the runs")
    rate = measure_read_rate(device) if any(row.step_bytes for row in report.rows) else None
    return replace(report, rows=tuple(replace(row, read_bytes_per_second=rate) for row in report.rows))


def plan_measurement(args: BenchmarkArgs, device: torch.device) -> list[Candidate]:
    """Engines first. A ValueError for what one of them could not serve, before others have worked for long."""
    engines = find_engines(args.engine_dir) if args.runs_engines else []
    workloads = make_workloads(args, engines)
    for engine in engines:
        check_engine(engine, args, workloads)
    found = [
        Candidate(
            open=partial(open_backend, engine, device),
            cases=cases(workloads, args.trt_max_batch_size or [engine.config.limits.max_batch_size]),
            repeats=args.repeats,
        )
        for engine in engines
    ]
    if args.runs_hf:
        open_hf = partial(HfBackend, args.hf_folder, args.data_type, device, dummy_weights=args.dummy_weights)
        repeats = args.hf_repeats or args.repeats
        found.append(Candidate(open_hf, cases(workloads, args.hf_max_batch_size), repeats))
    return found


def cases(workloads: Sequence[Workload], batch_sizes: Sequence[int]) -> list[tuple[Workload, int]]:
    """Equal prompts are one batch, a dataset is served with each batch size."""
    return [
        (workload, size)
        for workload in workloads
        for size in ([workload.shape.batch_size] if workload.shape else batch_sizes)
    ]


def make_workloads(args: BenchmarkArgs, engines: Sequence[EngineFolder]) -> list[Workload]:
    """The same for all backends, which have one vocabulary."""
    hf_size = QWenConfig.from_hf_dir(args.hf_folder).vocab_size if args.runs_hf else None
    vocab_size = hf_size or engines[0].config.vocab_size
    for engine in engines:
        if engine.config.vocab_size != vocab_size:
            source = args.hf_model_dir if args.runs_hf else engines[0].path
            raise ValueError(
                f"{engine.path} has a vocabulary of {engine.config.vocab_size}, expected {vocab_size} as {source} has: "
                f"it was built from another model"
            )
    if args.dataset:
        return [read_workload(path, args, engines, vocab_size) for path in args.dataset]
    return [equal_requests(shape, vocab_size, args.seed) for shape in args.shapes()]


def read_workload(path: Path, args: BenchmarkArgs, engines: Sequence[EngineFolder], vocab_size: int) -> Workload:
    entries = read_entries(path)
    if not is_sharegpt(entries):
        return requests_of_lengths(path, entries, args.num_prompts, vocab_size, args.seed)
    tokenizer_dir = args.tokenizer_dir or args.hf_model_dir
    if tokenizer_dir is None:
        raise ValueError(f"--tokenizer_dir is missing, expected a tokenizer's folder for the conversations of {path}")
    limits = SharegptLimits(
        args.max_input_len or min((engine.config.limits.max_input_len for engine in engines), default=2048),
        args.max_new_tokens or min((engine.config.limits.max_output_len for engine in engines), default=2048),
    )
    return requests_of_sharegpt(path, entries, args.num_prompts, load_tokenizer(tokenizer_dir), limits, args.seed)


def check_engine(engine: EngineFolder, args: BenchmarkArgs, workloads: Sequence[Workload]) -> None:
    """More prompts than a batch would wait in a queue, and longer ones fail only when their turn comes."""
    limits = engine.config.limits
    asked: list[tuple[str, int, int]] = []
    for workload in workloads:
        if shape := workload.shape:
            asked += [
                ("--batch_size", shape.batch_size, limits.max_batch_size),
                ("--input_len", shape.input_len, limits.max_input_len),
                ("--input_len + output_len", shape.input_len + shape.output_len, limits.max_seq_len),
            ]
            continue
        asked += [("--trt_max_batch_size", size, limits.max_batch_size) for size in args.trt_max_batch_size]
        for index, (prompt, output_len) in enumerate(zip(workload.prompts, workload.output_lens, strict=True)):
            request = f"--dataset {workload.source}: input_len of request {index}"
            asked += [
                (request, len(prompt), limits.max_input_len),
                (f"{request} + output_len", len(prompt) + output_len, limits.max_seq_len),
            ]
    for name, found, most in asked:
        if found > most:
            raise ValueError(f"{name} is {found}, expected at most {most} as {engine.path} was built")


def open_backend(engine: EngineFolder, device: torch.device) -> Backend:
    return EngineBackend(open_engine(engine.path, check_weights=False), f"trt_llm {engine.name}", device)


def measure_candidate(candidate: Candidate, warm_up: int, planning_seconds: float | None) -> list[Figures]:
    """`planning_seconds` is what this process did besides, None if it did more. No memory is held afterwards."""
    backend = candidate.open()
    first, _ = candidate.cases[0]
    backend.serve(first.prompts[:1], first.asking_for(2).output_lens[:1], 1, lambda positions: None)
    ready_seconds = None if planning_seconds is None else seconds_since_process_start() - planning_seconds
    rows = []
    for workload, batch_size in candidate.cases:
        try:
            rows.append(measure(backend, workload, batch_size, Runs(warm_up, candidate.repeats), ready_seconds))
        except torch.OutOfMemoryError:
            if backend.kind != "hf":
                raise  # an engine takes its memory at the start
            logger.warning("%s, %s, batch %d: out of memory, left out", backend.name, workload.name, batch_size)
    del backend
    gc.collect()  # a session and its graphs know each other
    return rows


def describe(args: BenchmarkArgs, device: torch.device) -> dict[str, object]:
    name = (
        torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device}, {torch.get_num_threads()} threads"
    )
    return {
        "device": name,
        "torch": torch.__version__,
        "warm_up": args.warm_up,
        "repeats": args.repeats,
        "seed": args.seed,
    }


if __name__ == "__main__":
    run_script(main, BenchmarkArgs, __doc__)
