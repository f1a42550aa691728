"""Compile a Hugging Face Qwen checkpoint into an engine.

    python build.py --hf_model_dir Qwen-7B-Chat --output_dir engines/7b --dtype float16

Weights stream from the checkpoint's shards into the engine file tensor by tensor: host memory stays at a few tensors,
whatever the model's size. No GPU is needed, and the engine runs on CUDA and on the CPU alike.

    python build.py --tune --output_dir engines/7b

times on this machine's GPU how the engine in that folder multiplies best; with a checkpoint, right after the build.

    python build.py --hf_model_dir Qwen-7B-Chat --output_dir engines/7b-trt --backend tensorrt

lets NVIDIA's TensorRT 11 compile the same network for the GPU of this machine (docs/tensorrt.md).
"""

import multiprocessing
import os
import resource
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

# A bare checkout works too, as on a GPU machine where nothing is installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from command_line import ArgumentError, run_script  # noqa: E402
from compiling.accuracy import Examination, accuracy_text, gate_for  # noqa: E402
from compiling.args import TENSORRT, BuildArgs  # noqa: E402
from compiling.estimate import Estimate  # noqa: E402
from compiling.tensorrt_plans import (  # noqa: E402
    check_engines,
    check_tensorrt_flags,
    save_plans,
    tensorrt_for_building,
)
from compiling.weight_source import WeightSource  # noqa: E402
from host_memory import peak_host_bytes  # noqa: E402
from staging import publish, staging_dir  # noqa: E402
from tqdm import tqdm  # noqa: E402

from tensorrt_llm import Builder, Engine  # noqa: E402
from tensorrt_llm.disk import check_room, gib  # noqa: E402
from tensorrt_llm.runtime.session import pick_device  # noqa: E402
from tensorrt_llm.timings import FILE_NAME as TIMINGS_FILE  # noqa: E402
from tensorrt_llm.tuning import Measured, tune  # noqa: E402
from tensorrt_llm.verdict import Verdict  # noqa: E402


def main(args: BuildArgs) -> None:
    started = time.monotonic()
    if args.max_beam_width != 1:
        raise ValueError(f"--max_beam_width is {args.max_beam_width}, expected 1: beam search is not supported yet")
    trt = None
    if args.backend == TENSORRT:
        check_tensorrt_flags(args)
        trt = tensorrt_for_building()
    if args.tune:
        check_tunable(args)
    if args.tune and args.hf_model_dir is None:
        tune_engine(args)
        return
    args.mapping(rank=0)  # refuses sizes that do not add up, before anything is made for each rank
    source = WeightSource.open(args)
    engines = [source.engine(rank) for rank in range(args.world_size)]
    if trt:
        check_engines(engines)
    estimate = Estimate.of(engines[0], source)
    if args.dry_run:
        print(estimate)
        return
    check_room(args.output_dir, estimate.disk, "engine")
    with staging_dir(args.output_dir) as staging:
        verdict = judge(source)
        for engine in engines:
            engine.config = replace(engine.config, verdict=verdict)
        if trt:
            save_plans(engines, trt, staging)
        else:
            save_engines(engines, args, verdict, staging)
        if args.visualize:
            write_networks(engines, staging)
        # Timings of the engine that was there before, which may have had other shapes.
        (args.output_dir / TIMINGS_FILE).unlink(missing_ok=True)
        publish(staging, args.output_dir)
    print_summary(args.output_dir, args.backend, engines, time.monotonic() - started)
    if args.tune:
        tune_engine(args)


def judge(source: WeightSource) -> Verdict | None:
    """Measure what quantization costs, before anything is written; a missed gate is a ValueError.

    Ranks hold equal parts of the model that one rank would hold, so that is what is measured.
    """
    args, scheme = source.args, source.scheme
    if not source.is_judged:
        return None
    text = accuracy_text(
        args.accuracy_text,
        source.calibration_ids,
        args.checkpoint_dir,
        source.config.vocab_size,
        args.accuracy_tokens,
    )
    gate = gate_for(scheme.mode, args.accuracy_gate)
    unquantized, reference_name = source.unquantized_engine()
    examination = Examination(text, gate, pick_device(args.device), args.allow_accuracy_loss)
    return examination.judge(source.whole_engine(), unquantized, reference_name)


def save_engines(engines: list[Engine], args: BuildArgs, verdict: Verdict | None, folder: Path) -> None:
    """The engine files of all ranks, and config.json."""
    if args.parallel_build and args.world_size > 1:
        build_in_parallel(args, verdict, folder)
    else:
        for engine in engines:
            save_engine(engine, folder)
    Builder.save_config(engines[0].config, folder / "config.json")


def save_engine(engine: Engine, folder: Path) -> None:
    """Write one rank's engine file, with a bar that names the layer in work."""
    sizes = {spec.name: spec.num_bytes for spec in engine.plan.weights}
    label = f"rank {engine.config.rank}"
    with tqdm(total=engine.weight_bytes, unit="B", unit_scale=True, unit_divisor=1024, desc=label) as bar:
        done: list[str] = []

        def on_weight(name: str) -> None:
            bar.update(sizes[done[-1]] if done else 0)
            bar.set_postfix_str(name.rpartition(".")[0], refresh=False)
            done.append(name)

        engine.save(folder / engine.config.engine_name, on_weight)
        bar.update(sizes[done[-1]])


def build_in_parallel(args: BuildArgs, verdict: Verdict | None, folder: Path) -> None:
    """One process per rank, as many at a time as there are cores."""
    context = multiprocessing.get_context("spawn")  # a fork would share CUDA's state
    with ProcessPoolExecutor(min(args.world_size, os.cpu_count() or 1), context) as pool:
        try:
            with ignored_interrupts():
                builds = [pool.submit(build_rank, args, verdict, rank, folder) for rank in range(args.world_size)]
            for build in builds:
                build.result()
        except BrokenProcessPool as error:
            raise ValueError(
                "the process of a rank was killed, as happens when memory runs out; build without --parallel_build"
            ) from error
        except BaseException:
            # After an error or an interrupt nobody wants the other ranks.
            for process in multiprocessing.active_children():
                process.terminate()
            raise


@contextmanager
def ignored_interrupts() -> Iterator[None]:
    """Processes started inside don't hear a Ctrl-C: they would each print a traceback. The parent ends them."""
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def build_rank(args: BuildArgs, verdict: Verdict | None, rank: int, folder: Path) -> None:
    engine = WeightSource.open(args).engine(rank)
    engine.config = replace(engine.config, verdict=verdict)
    save_engine(engine, folder)


def check_tunable(args: BuildArgs) -> None:
    if pick_device(args.device).type != "cuda":
        raise ArgumentError(
            "--tune times kernels on a GPU, and there is none that torch can use; build without it, and run "
            "build.py --tune --output_dir DIR where the engine will run"
        )


def tune_engine(args: BuildArgs) -> None:
    """Of the engine's ranks, which all have matmuls of the same shapes, one is timed."""
    started = time.monotonic()
    engine = Engine.from_dir(args.output_dir, check_weights=False)
    if engine.config.batch_invariant:
        print("Nothing to tune: a batch-invariant engine multiplies in one way for all steps")
        return
    with tqdm(unit=" timed", desc="tactics") as bar:

        def on_measured(measured: Measured) -> None:
            bar.update(len(measured.seconds))
            bar.set_postfix_str(f"{measured.name}, {measured.tokens} tokens", refresh=False)

        tuning = tune(engine, pick_device(args.device), on_measured)
    print(f"Tuned in {time.monotonic() - started:.1f} s: {tuning}")


def write_networks(engines: list[Engine], folder: Path) -> None:
    for engine in engines:
        (folder / f"network_rank{engine.config.rank}.txt").write_text(f"{engine.plan}\n")


def print_summary(output_dir: Path, backend: str, engines: list[Engine], seconds: float) -> None:
    suffix = ".plan" if backend == TENSORRT else ".engine"
    paths = [(output_dir / engine.config.engine_name).with_suffix(suffix) for engine in engines]
    size = sum(path.stat().st_size for path in paths)
    peak = max(peak_host_bytes(), resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)
    verdict = engines[0].config.verdict
    if verdict is not None:
        print(f"Accuracy: {verdict}")
    elif engines[0].config.quant_algo or engines[0].config.quant_mode:
        print("Accuracy: not measured, the weights are random")
    print(f"Built in {seconds:.1f} s, peak host memory {gib(peak)}, engine size {gib(size)}")
    print(f"Engine: {output_dir}")


if __name__ == "__main__":
    run_script(main, BuildArgs, __doc__)
