"""Check the CUDA kernels on the GPU of this machine, then time them at Qwen-7B shapes against their byte floor.

    python3 tools/gpu_check.py --output kernels.json

Runs from a bare checkout. Correctness is tests/kernels and tests/runtime. A time is that of one op among a chain of
copies of it, captured in one CUDA graph; the copies have weights and KV pools of their own, more than the L2 cache
together, so each reads from memory. The floor is the bytes an op must move over the read rate measured here first.
"""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples" / "qwen")]

import torch  # noqa: E402
from benchmarking.read_rate import measure_read_rate  # noqa: E402
from command_line import flag, log_level_flag, run_script  # noqa: E402
from table import markdown_table  # noqa: E402

from tensorrt_llm.dtype import torch_dtype  # noqa: E402
from tensorrt_llm.kernels import StepShape  # noqa: E402
from tensorrt_llm.kernels.cuda import (  # noqa: E402
    add_rms_norm,
    cuda_kernels,
    gated_mlp,
    matmul,
    quantize_per_token,
)
from tensorrt_llm.kernels.cuda.attention import GptAttention  # noqa: E402

HIDDEN, HEADS, HEAD_SIZE, MLP_HIDDEN, VOCABULARY = 4096, 32, 128, 11008, 151936
TOKENS_PER_BLOCK = 64
# Rows, columns and bias of the projections of a layer, beside the gated MLP.
PROJECTIONS = {
    "qkv": (3 * HIDDEN, HIDDEN, True),
    "dense": (HIDDEN, HIDDEN, False),
    "mlp proj": (HIDDEN, MLP_HIDDEN, False),
}
L2_BYTES = 64 * 2**20  # at least that of an H100 or H200
DEVICE = "cuda"

Op = Callable[[], object]


@dataclass(frozen=True)
class CheckArgs:
    output: Path = flag(help="JSON file for all figures")
    dtype: str = flag("float16", help="of weights and KV cache", choices=("float16", "bfloat16", "float32"))
    skip_tests: bool = flag(False, help="time only")
    repeats: int = flag(20, help="replays of a chain; the median counts")
    log_level: str = log_level_flag("warning")


@dataclass(frozen=True)
class Timing:
    """One op: its time, the bytes it must move, and its floating point operations where they may bound it."""

    name: str
    microseconds: float
    moved_bytes: int
    operations: int

    def floor(self, read_rate: float) -> float:
        """Microseconds that the bytes take at `read_rate` bytes per second."""
        return self.moved_bytes / read_rate * 1e6


@dataclass(frozen=True)
class Work:
    """What to time: `make()` gives a copy of the op with operands of its own."""

    name: str
    make: Callable[[], Op]
    moved_bytes: int
    operations: int = 0


def main(args: CheckArgs) -> int:
    if not torch.cuda.is_available():
        raise ValueError("no CUDA device that torch can use; this check is for a machine with an NVIDIA GPU")
    tests_passed = None if args.skip_tests else run_tests()
    read_rate = measure_read_rate(torch.device(DEVICE), args.repeats)
    with torch.inference_mode():
        timings = [time_work(work, args.repeats) for work in all_work(args.dtype)]
    rows = [
        (
            timing.name,
            f"{timing.microseconds:.1f}",
            f"{timing.floor(read_rate):.1f}",
            f"{timing.floor(read_rate) / timing.microseconds:.0%}",
            f"{timing.operations / timing.microseconds / 1e6:.0f}" if timing.operations else "-",
        )
        for timing in timings
    ]
    figures = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "dtype": args.dtype,
        "tests_passed": tests_passed,
        "read_bytes_per_second": read_rate,
        "timings": [asdict(timing) for timing in timings],
    }
    args.output.write_text(json.dumps(figures, indent=1))
    print(markdown_table((f"Qwen-7B {args.dtype}", "us", "floor us", "of floor", "TFLOP/s"), rows))
    print(f"{figures['gpu']}, torch {figures['torch']}, reads at {read_rate / 1e12:.2f} TB/s, tests: {tests_passed}")
    return 1 if tests_passed is False else 0


def run_tests() -> bool:
    """Tests of kernels and runtime on the device, in a process of its own: a crash there must not end the timings."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/kernels", "tests/runtime"]
    return subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}).returncode == 0


def time_work(work: Work, repeats: int) -> Timing:
    """Chain as many copies as fill the L2 cache three times over, at least 4 and at most 200."""
    copies = min(max(4, -(-3 * L2_BYTES // work.moved_bytes)), 200)
    microseconds = time_chain([work.make() for _ in range(copies)], repeats)
    print(f"{work.name}: {microseconds:.1f} us", file=sys.stderr, flush=True)
    return Timing(work.name, microseconds, work.moved_bytes, work.operations)


def time_chain(ops: list[Op], repeats: int) -> float:
    """Median microseconds of one op of a chain that is replayed as a CUDA graph."""
    for op in ops:
        op()  # compiles, and lets cuBLAS take its workspace
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for op in ops:
            op()
    times = []
    for _ in range(repeats + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(ops))
    return statistics.median(times[2:])


def all_work(dtype: str) -> list[Work]:
    return [
        *(work for tokens in (1, 32, 1024) for work in dense_work(tokens, dtype)),
        *(work for tokens in (1, 32, 1024) for bits in (8, 4) for work in weight_only_work(tokens, bits, dtype)),
        *(work for tokens in (1, 32, 1024) for work in smooth_quant_work(tokens, dtype)),
        *(
            decode_work(batch, length, HEADS, dtype)
            for batch, length in ((1, 64), (1, 256), (1, 1024), (1, 8192), (32, 256), (32, 1024), (64, 1024))
        ),
        decode_work(32, 256, HEADS, dtype, bound=4096),
        *(decode_work(batch, length, 4, dtype) for batch, length in ((1, 256), (1, 8192), (64, 1024))),
        *(decode_work(64, 1024, kv_heads, dtype, kv_dtype="int8") for kv_heads in (HEADS, 4)),
        decode_work(1, 8192, HEADS, dtype, kv_dtype="int8"),
        *(prefill_work(batch, length, dtype) for batch, length in ((1, 128), (1, 2048), (16, 512))),
        prefill_work(16, 512, dtype, kv_dtype="int8"),
    ]


def dense_work(tokens: int, dtype: str) -> list[Work]:
    """The matmuls and the norm of a layer, and the logits, for `tokens` tokens."""
    kind = torch_dtype(dtype)
    size = kind.itemsize

    def values(*shape: int, kind: torch.dtype = kind) -> torch.Tensor:
        return (torch.randn(shape, device=DEVICE) / 64).to(kind)

    def make_norm() -> Op:
        x, y, weight = values(tokens, HIDDEN, kind=torch.float32), values(tokens, HIDDEN), values(HIDDEN)
        return partial(add_rms_norm, x, y, weight, eps=1e-6, dtype=dtype)

    def make_mlp() -> Op:
        return partial(gated_mlp, values(tokens, HIDDEN), values(2 * MLP_HIDDEN, HIDDEN), dtype=dtype)

    def make_matmul(rows: int, depth: int, bias: bool, out: str) -> Op:
        return partial(matmul, values(tokens, depth), values(rows, depth), values(rows) if bias else None, dtype=out)

    works = [
        Work(f"add_rms_norm, {tokens} tokens", make_norm, tokens * HIDDEN * (8 + 2 * size) + HIDDEN * size),
        Work(
            f"gated_mlp, {tokens} tokens",
            make_mlp,
            size * (2 * MLP_HIDDEN * HIDDEN + tokens * (HIDDEN + MLP_HIDDEN)),
            4 * tokens * MLP_HIDDEN * HIDDEN,
        ),
    ]
    shapes = [(name, rows, depth, bias, dtype) for name, (rows, depth, bias) in PROJECTIONS.items()]
    if tokens <= 64:  # logits are wanted of one token a sequence
        shapes.append(("logits", VOCABULARY, HIDDEN, False, "float32"))
    for name, rows, depth, bias, out in shapes:
        moved = size * (rows * depth + tokens * depth) + tokens * rows * torch_dtype(out).itemsize
        make = partial(make_matmul, rows, depth, bias, out)
        works.append(Work(f"matmul {name}, {tokens} tokens", make, moved, 2 * tokens * rows * depth))
    return works


def weight_only_work(tokens: int, bits: int, dtype: str) -> list[Work]:
    """The matmuls of a layer with int8 weights, a scale for each row, or int4 in groups of 128; and int8 logits."""
    kind = torch_dtype(dtype)
    scheme = "int8" if bits == 8 else "int4 g128"

    def make(op: str, rows: int, depth: int, matrices: int, bias: bool, out: str) -> Op:
        weights: list[torch.Tensor] = []
        for _ in range(matrices):
            bounds = (-128, 128) if bits == 8 else (0, 256)
            stored = torch.int8 if bits == 8 else torch.uint8
            weights.append(torch.randint(*bounds, (rows, depth * bits // 8), dtype=stored, device=DEVICE))
            weights.append((torch.rand(rows, 1 if bits == 8 else depth // 128, device=DEVICE) / 64).half().float())
        if bias:
            weights.append(torch.randn(rows, device=DEVICE).to(kind))
        x = torch.randn(tokens, depth, device=DEVICE).to(kind)
        return prepared_op(op, (x,), weights, bits=bits, has_zero=False, dtype=out)

    def work(name: str, op: str, rows: int, depth: int, matrices: int, bias: bool, out: str) -> Work:
        weights = matrices * rows * (depth * bits // 8 + (4 if bits == 8 else 2 * depth // 128))
        moved = weights + tokens * (depth * kind.itemsize + rows * torch_dtype(out).itemsize)
        operations = 2 * matrices * tokens * rows * depth
        return Work(
            f"{scheme} {name}, {tokens} tokens", partial(make, op, rows, depth, matrices, bias, out), moved, operations
        )

    works = [work("gated_mlp", "weight_only_gated_mlp", MLP_HIDDEN, HIDDEN, 2, False, dtype)]
    for name, (rows, depth, bias) in PROJECTIONS.items():
        works.append(work(name, "weight_only_quant_matmul", rows, depth, 1, bias, dtype))
    if bits == 8 and tokens <= 64:
        works.append(work("logits", "weight_only_quant_matmul", VOCABULARY, HIDDEN, 1, False, "float32"))
    return works


def smooth_quant_work(tokens: int, dtype: str) -> list[Work]:
    """The matmuls of a layer in W8A8, and the quantization of what goes into them."""
    kind = torch_dtype(dtype)

    def integers(*shape: int) -> torch.Tensor:
        return torch.randint(-127, 128, shape, dtype=torch.int8, device=DEVICE)

    def scales(*shape: int) -> torch.Tensor:
        return torch.rand(shape, device=DEVICE) / 64

    def make(op: str, rows: int, depth: int, matrices: int, bias: bool) -> Op:
        weights = [tensor for _ in range(matrices) for tensor in (integers(rows, depth), scales(rows))]
        if bias:
            weights.append(torch.randn(rows, device=DEVICE).to(kind))
        return prepared_op(op, (integers(tokens, depth), scales(tokens, 1)), weights, dtype=dtype)

    def make_quantize() -> Op:
        return partial(quantize_per_token, torch.randn(tokens, MLP_HIDDEN, device=DEVICE).to(kind))

    matmuls = {"gated_mlp": ("smooth_quant_gated_mlp", MLP_HIDDEN, HIDDEN, 2, False)}
    for name, (rows, depth, bias) in PROJECTIONS.items():
        matmuls[name] = ("smooth_quant_gemm", rows, depth, 1, bias)
    works = [Work(f"quantize, {tokens} tokens", make_quantize, tokens * MLP_HIDDEN * (kind.itemsize + 1))]
    for name, (op, rows, depth, matrices, bias) in matmuls.items():
        moved = matrices * rows * (depth + 4) + tokens * (depth + rows * kind.itemsize)
        operations = 2 * matrices * tokens * rows * depth
        works.append(
            Work(f"W8A8 {name}, {tokens} tokens", partial(make, op, rows, depth, matrices, bias), moved, operations)
        )
    return works


def prepared_op(op: str, values: tuple[torch.Tensor, ...], weights: list[torch.Tensor], **attributes: object) -> Op:
    """A call of `op` with its weights in the layout of its kernel."""
    kernel = cuda_kernels()[op]
    prepared = kernel.prepare(*weights, **attributes) if kernel.prepare else weights
    return partial(kernel.run, *values, *prepared, **attributes)


def decode_work(
    batch: int, length: int, kv_heads: int, dtype: str, bound: int | None = None, kv_dtype: str | None = None
) -> Work:
    """gpt_attention of `batch` decodes at context `length`; the grid is made for `bound` tokens."""
    step = StepShape(batch, batch, 0, 0, 1, bound or length)
    vector = HEAD_SIZE + 4 if kv_dtype == "int8" else HEAD_SIZE * torch_dtype(dtype).itemsize
    name = f"decode, {batch} x {length}, {kv_heads} KV heads" + (f", grid for {bound}" if bound else "")
    return Work(
        name + (f", {kv_dtype}" if kv_dtype else ""),
        partial(make_attention, step, length, kv_heads, dtype, kv_dtype or dtype),
        2 * batch * length * kv_heads * vector,
    )


def prefill_work(batch: int, length: int, dtype: str, kv_dtype: str | None = None) -> Work:
    """gpt_attention of `batch` whole prompts."""
    step = StepShape(batch * length, batch, batch, batch * length, length, length)
    # q, k and v are read; k, v and the result are written.
    moved = 6 * step.num_tokens * HEADS * HEAD_SIZE * torch_dtype(dtype).itemsize
    operations = batch * 2 * length * (length + 1) * HEADS * HEAD_SIZE
    name = f"prefill, {batch} x {length}" + (f", {kv_dtype}" if kv_dtype else "")
    return Work(name, partial(make_attention, step, length, HEADS, dtype, kv_dtype or dtype), moved, operations)


def make_attention(step: StepShape, length: int, kv_heads: int, dtype: str, kv_dtype: str) -> Op:
    """A step of equal sequences of `length` tokens over a pool of its own, the blocks in random order."""
    kind = torch_dtype(dtype)
    blocks = -(-length // TOKENS_PER_BLOCK)
    pool = torch.randn(1 + step.batch_size * blocks, 2, kv_heads, TOKENS_PER_BLOCK, HEAD_SIZE, device=DEVICE)
    scales = torch.full(pool.shape[:-1], 1 / 32, device=DEVICE) if kv_dtype == "int8" else None
    pool = (pool * 32).clamp(-127, 127).to(torch.int8) if kv_dtype == "int8" else pool.to(kind)
    tables = (torch.randperm(step.batch_size * blocks, device=DEVICE) + 1).int().view(step.batch_size, blocks)
    new = step.num_tokens // step.batch_size
    positions = torch.arange(length - new, length, dtype=torch.int32, device=DEVICE).repeat(step.batch_size)
    starts = torch.arange(step.batch_size + 1, dtype=torch.int32, device=DEVICE) * new
    lengths = torch.full((step.batch_size,), length, dtype=torch.int32, device=DEVICE)
    qkv = torch.randn(step.num_tokens, (HEADS + 2 * kv_heads) * HEAD_SIZE, device=DEVICE).to(kind)
    return partial(
        GptAttention(is_batch_invariant=False), qkv, pool, positions, starts, lengths, lengths, tables, scales,
        step=step, num_heads=HEADS, num_kv_heads=kv_heads, head_size=HEAD_SIZE, rotary_base=10000.0,
        rotary_dim=HEAD_SIZE, ntk_length=2048, logn_length=2048,
    )  # fmt: skip


if __name__ == "__main__":
    run_script(main, CheckArgs, __doc__)
