"""Compile a Hugging Face Qwen checkpoint into an engine.

    python build.py --hf_model_dir Qwen-7B-Chat --output_dir engines/7b --dtype float16

Weights stream from the checkpoint's shards into the engine file tensor by tensor: host memory stays at a few tensors,
whatever the model's size. No GPU is needed, and the engine runs on CUDA and on the CPU alike.
"""

import logging
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

# A bare checkout works too, as on a GPU machine where nothing is installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from command_line import flag, log_level_flag, run_script  # noqa: E402
from dummy_weights import load_dummy_weights  # noqa: E402
from hf_checkpoint import READABLE_DTYPES, HfCheckpoint  # noqa: E402
from tqdm import tqdm  # noqa: E402
from weight import load_from_hf_qwen  # noqa: E402

from tensorrt_llm import Builder, Engine, Limits, Mapping, net_guard  # noqa: E402
from tensorrt_llm.dtype import PRECISIONS, itemsize  # noqa: E402
from tensorrt_llm.models import QWenConfig, QWenForCausalLM  # noqa: E402
from tensorrt_llm.runtime.session import pick_device  # noqa: E402

logger = logging.getLogger("build")

_ALWAYS_ON = "accepted: always on"


@dataclass(frozen=True)
class BuildArgs:
    hf_model_dir: Path = flag(help="folder of the Hugging Face checkpoint")
    output_dir: Path = flag(help="folder for the engine files and config.json; made if it is missing")
    dtype: str = flag("float16", help="dtype of weights, activations and KV cache", choices=PRECISIONS)
    max_batch_size: int = flag(8, help="sequences that run at the same time; more wait in a queue")
    max_input_len: int = flag(2048, help="tokens of one prompt")
    max_output_len: int = flag(2048, help="new tokens of one sequence", aliases=("--max_new_tokens",))
    max_num_tokens: int | None = flag(
        None, help="tokens of all sequences in one step (default: the larger of 4096 and max_batch_size)"
    )
    tokens_per_block: int = flag(64, help="tokens per block of the paged KV cache, a power of two")
    world_size: int = flag(1, help="ranks that share the model, one engine file each")
    tp_size: int = flag(1, help="tensor-parallel ranks")
    pp_size: int = flag(1, help="pipeline-parallel ranks; only 1 is supported")
    parallel_build: bool = flag(False, help="build the ranks' engines at the same time, one process each")
    dummy_weights: bool = flag(False, help="random weights; hf_model_dir needs only config.json")
    dry_run: bool = flag(False, help="print what the build and the engine will take, and stop")
    device: str | None = flag(None, help="where dummy weights are made: cpu or cuda (default: cuda when there is one)")
    visualize: bool = flag(False, help="also write the optimized network as text, network_rank<N>.txt")
    log_level: str = log_level_flag("warning")
    max_beam_width: int = flag(1, help="only 1 is supported: there is no beam search yet")
    use_gpt_attention_plugin: str | None = flag(None, help=_ALWAYS_ON, optional_value=True)
    use_gemm_plugin: str | None = flag(None, help=_ALWAYS_ON, optional_value=True)
    remove_input_padding: bool = flag(False, help=_ALWAYS_ON)
    enable_context_fmha: bool = flag(False, help=_ALWAYS_ON)
    enable_context_fmha_fp32_acc: bool = flag(False, help=_ALWAYS_ON)
    paged_kv_cache: bool = flag(False, help=_ALWAYS_ON)
    use_inflight_batching: bool = flag(False, help=_ALWAYS_ON)
    strongly_typed: bool = flag(False, help=_ALWAYS_ON)
    enable_debug_output: bool = flag(False, help=_ALWAYS_ON + ", see run.py --debug_mode")

    def limits(self) -> Limits:
        return Limits(
            max_batch_size=self.max_batch_size,
            max_input_len=self.max_input_len,
            max_output_len=self.max_output_len,
            max_num_tokens=max(4096, self.max_batch_size) if self.max_num_tokens is None else self.max_num_tokens,
            tokens_per_block=self.tokens_per_block,
        )

    def mapping(self, rank: int) -> Mapping:
        return Mapping(world_size=self.world_size, rank=rank, tp_size=self.tp_size, pp_size=self.pp_size)


def main(args: BuildArgs) -> None:
    started = time.monotonic()
    if args.max_beam_width != 1:
        raise ValueError(f"--max_beam_width is {args.max_beam_width}, expected 1: beam search is not supported yet")
    config = QWenConfig.from_hf_dir(args.hf_model_dir)
    args.mapping(rank=0)  # refuses sizes that do not add up, before anything is made for each rank
    engines = [describe_engine(args, config, rank) for rank in range(args.world_size)]
    estimate = Estimate.of(engines[0], args)
    if args.dry_run:
        print(estimate)
        return
    estimate.check_disk(args.output_dir)
    with staging_dir(args.output_dir) as staging:
        if args.parallel_build and args.world_size > 1:
            build_in_parallel(args, config, staging)
        else:
            for engine in engines:
                save_engine(engine, staging)
        Builder.save_config(engines[0].config, staging / "config.json")
        if args.visualize:
            write_networks(engines, staging)
        publish(staging, args.output_dir)
    print_summary(args.output_dir, engines, time.monotonic() - started)


def describe_engine(args: BuildArgs, config: QWenConfig, rank: int) -> Engine:
    """The engine of one rank, its weights still in the checkpoint."""
    model = QWenForCausalLM(config, args.dtype, args.mapping(rank))
    device = pick_device(args.device)
    if args.dummy_weights:
        load_dummy_weights(model, device)
    else:
        load_from_hf_qwen(model, args.hf_model_dir, config, model.mapping)
    builder = Builder()
    network = builder.create_network()
    network.set_named_parameters(model.named_parameters())
    with net_guard(network):
        model(**model.prepare_inputs(args.tokens_per_block))
    return builder.build_engine(network, builder.create_builder_config(model, args.limits()))


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


def build_in_parallel(args: BuildArgs, config: QWenConfig, folder: Path) -> None:
    """One process per rank, as many at a time as there are cores."""
    context = multiprocessing.get_context("spawn")  # a fork would share CUDA's state
    with ProcessPoolExecutor(min(args.world_size, os.cpu_count() or 1), context) as pool:
        try:
            with ignored_interrupts():
                builds = [pool.submit(build_rank, args, config, rank, folder) for rank in range(args.world_size)]
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


def build_rank(args: BuildArgs, config: QWenConfig, rank: int, folder: Path) -> None:
    save_engine(describe_engine(args, config, rank), folder)


@contextmanager
def staging_dir(output_dir: Path) -> Iterator[Path]:
    """A folder inside the output folder that is gone afterwards, also when the build fails or is interrupted."""
    if output_dir.exists() and not output_dir.is_dir():
        raise ValueError(f"--output_dir {output_dir} is a file, expected a folder or a name that is free")
    made = [folder for folder in (output_dir, *output_dir.parents) if not folder.exists()]
    previous = signal.signal(signal.SIGTERM, _raise_interrupt)
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".building-", dir=output_dir) as staging:
            yield Path(staging)
    finally:
        signal.signal(signal.SIGTERM, previous)
        for folder in made:
            if folder.exists() and not any(folder.iterdir()):
                folder.rmdir()


def _raise_interrupt(signum: int, frame: object) -> None:
    raise KeyboardInterrupt


def publish(staging: Path, output_dir: Path) -> None:
    """Move the finished files into place; config.json, which makes a folder an engine, comes last."""
    for file in sorted(staging.iterdir(), key=lambda file: file.name == "config.json"):
        file.replace(output_dir / file.name)


def write_networks(engines: list[Engine], folder: Path) -> None:
    for engine in engines:
        (folder / f"network_rank{engine.config.rank}.txt").write_text(f"{engine.plan}\n")


# Tensors below 32 MB that are put together (q, k and v of Qwen2) or cast lie on the heap, which does not always reuse
# the place of the last one: builds of one checkpoint (1.8B, float16) peaked at 0.83 to 0.99 GiB for 0.80 in use.
_HEAP_SHARE = 1.1


@dataclass(frozen=True)
class Estimate:
    """What a build takes on the host, and what its engine takes where it runs; bytes, per rank but for the disk."""

    host: int
    disk: int
    weights: int
    kv_cache: int
    activations: int

    @classmethod
    def of(cls, engine: Engine, args: BuildArgs) -> "Estimate":
        largest = max(spec.num_elements for spec in engine.plan.weights)
        stored = stored_dtype(args)
        bytes_per_element = itemsize(stored) + (itemsize(args.dtype) if stored != args.dtype else 0)
        limits = engine.config.limits
        return cls(
            # Torch itself, then the largest tensor: as the checkpoint's mapped file holds it, and as it is cast.
            host=int(_HEAP_SHARE * (_peak_host_bytes() + largest * bytes_per_element)),
            disk=engine.weight_bytes * args.world_size,
            weights=engine.weight_bytes,
            kv_cache=engine.config.kv_bytes_per_token * limits.max_batch_size * limits.max_seq_len,
            activations=engine.config.activation_bytes,
        )

    def check_disk(self, output_dir: Path) -> None:
        existing = next(folder for folder in (output_dir.absolute(), *output_dir.absolute().parents) if folder.exists())
        free = shutil.disk_usage(existing).free
        if free < self.disk:
            raise ValueError(f"{output_dir}: the engine takes {_gib(self.disk)}, the disk has {_gib(free)} free")

    def __str__(self) -> str:
        device = self.weights + self.kv_cache + self.activations
        return "\n".join(
            (
                "Estimate, nothing was built:",
                f"  host memory to build   {_gib(self.host)}",
                f"  disk                   {_gib(self.disk)}",
                f"  device memory to run   {_gib(device)}  (weights {_gib(self.weights)}, KV cache of a full batch "
                f"{_gib(self.kv_cache)}, activations {_gib(self.activations)})",
            )
        )


def stored_dtype(args: BuildArgs) -> str:
    """The widest dtype among the tensors that this build reads."""
    if args.dummy_weights:
        return args.dtype
    found = {info.dtype for info in HfCheckpoint(args.hf_model_dir).tensors().values()}
    return max(found & set(READABLE_DTYPES), key=itemsize)


def _peak_host_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"


def print_summary(output_dir: Path, engines: list[Engine], seconds: float) -> None:
    size = sum((output_dir / engine.config.engine_name).stat().st_size for engine in engines)
    peak = max(_peak_host_bytes(), resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)
    print(f"Built in {seconds:.1f} s, peak host memory {_gib(peak)}, engine size {_gib(size)}")
    print(f"Engine: {output_dir}")


if __name__ == "__main__":
    run_script(main, BuildArgs, __doc__)
