"""Time every candidate of every kernel at the shapes of a model, cold, and hold it against what the GPU can do.

    python3 tools/kernel_bench.py --output kernels.json
    python3 tools/kernel_bench.py --parts matmuls --modes int4 --tokens 1 8

Runs from a bare checkout; the defaults are Qwen-7B. A time is that of one op among a chain of copies in one CUDA graph,
whose weights or KV pools are more than the L2 together (tensorrt_llm/tuning/cold_timing.py). The ceilings are measured
first: memory by the fastest read, arithmetic by cuBLAS on square matrices. "Of ceiling" is the time that the bytes or
the operations take at these rates, whichever is longer, over the time taken. A star is at the tactic that heuristics
choose. With --device cpu and small numbers it shows that it works, on the one kernel of each op that a CPU has.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples" / "qwen")]

import torch  # noqa: E402
from benchmarking.read_rate import measure_read_rate  # noqa: E402
from command_line import flag, log_level_flag, run_script  # noqa: E402
from compiling.compile_model import compile_model  # noqa: E402
from table import markdown_table  # noqa: E402

from tensorrt_llm import Limits  # noqa: E402
from tensorrt_llm.dtype import PRECISIONS, torch_dtype  # noqa: E402
from tensorrt_llm.kernels import Kernel, StepShape, kernels_for  # noqa: E402
from tensorrt_llm.kernels.tactics import BUCKETS  # noqa: E402
from tensorrt_llm.models import QWenConfig, QWenForCausalLM, quantize_model  # noqa: E402
from tensorrt_llm.plan import Plan, PlanNode  # noqa: E402
from tensorrt_llm.quantization import QuantMode  # noqa: E402
from tensorrt_llm.runtime.session import pick_device, prepare_device  # noqa: E402
from tensorrt_llm.runtime.stored_tactics import specs_of  # noqa: E402
from tensorrt_llm.tuning import Bench, Measured, RandomCall, measure_matmuls, time_in_turns  # noqa: E402
from tensorrt_llm.tuning.cold_timing import Op, chain_of, copies_for  # noqa: E402

MODES: dict[str, tuple[QuantMode, dict[str, Any]]] = {
    "fp16": (QuantMode(0), {}),
    "int8": (QuantMode.use_weight_only(), {"quantize_lm_head": True}),
    "int4": (QuantMode.use_weight_only(use_int4_weights=True, per_group=True), {"group_size": 128}),
    "int4_awq": (QuantMode.use_weight_only(use_int4_weights=True, per_group=True), {"group_size": 128, "zero": True}),
    "w8a8": (QuantMode.use_smooth_quant(per_token=True, per_channel=True), {}),
}
PARTS = ("matmuls", "small", "decode", "prefill")
SMALL_OPS = ("rms_norm", "add_rms_norm", "rms_norm_quantize", "add_rms_norm_quantize", "quantize_per_token")
TOKENS_PER_BLOCK = 64


@dataclass(frozen=True)
class BenchArgs:
    parts: list[str] = flag(list(PARTS), help=f"what to time: {', '.join(PARTS)}")
    modes: list[str] = flag(["fp16", "int8", "int4", "w8a8"], help=f"how weights are stored: {', '.join(MODES)}")
    tokens: list[int] = flag([1, 2, 4, 8, 16, 32, 64, 128], help="tokens of a step, for matmuls and small ops")
    batch_size: list[int] = flag([1, 8, 32, 64], help="decodes of a step")
    context: list[int] = flag([128, 1024, 4096], help="tokens that a decode attends to")
    prompt: list[int] = flag([128, 512, 2048], help="tokens of a prompt")
    dtype: str = flag("float16", help="of weights, activations and KV cache", choices=PRECISIONS)
    hidden_size: int = flag(4096, help="of the model")
    intermediate_size: int = flag(22016, help="of the model: both branches of the MLP together")
    num_heads: int = flag(32, help="of the model")
    num_kv_heads: int | None = flag(None, help="of the model (default: num_heads)")
    vocab_size: int = flag(151936, help="of the model")
    rounds: int = flag(20, help="replays of a chain; the median counts")
    output: Path | None = flag(None, help="JSON file for all figures")
    device: str | None = flag(None, help="cpu or cuda (default: cuda when there is one)")
    log_level: str = log_level_flag("warning")


@dataclass(frozen=True)
class Ceilings:
    """What the device does at most, a second."""

    read_bytes: float
    operations: float  # of the model's dtype

    def share(self, row: "Row") -> float:
        operations = self.operations * (2 if row.mode == "w8a8" else 1)  # int8 runs at twice the rate of float16
        return max(row.moved_bytes / self.read_bytes, row.operations / operations) / row.seconds


@dataclass(frozen=True)
class Row:
    """One timing."""

    mode: str
    name: str
    tactic: str
    seconds: float
    moved_bytes: int
    operations: int = 0

    @property
    def rate(self) -> str:
        """Of operations where there are many for each byte."""
        if self.operations > 100 * self.moved_bytes:
            return f"{self.operations / self.seconds / 1e12:.0f} TFLOP/s"
        return f"{self.moved_bytes / self.seconds / 1e9:.0f} GB/s"


def main(args: BenchArgs) -> None:
    lists = (("parts", args.parts, PARTS), ("modes", args.modes, tuple(MODES)), ("tokens", args.tokens, BUCKETS))
    for name, given, known in lists:
        if not set(given) <= set(known):
            found, expected = (", ".join(map(str, values)) for values in (given, known))
            raise ValueError(f"--{name} has {found}, expected some of {expected}")
    device = pick_device(args.device)
    prepare_device(device)
    ceilings = measure_ceilings(args, device)
    rows = []
    with torch.inference_mode():
        for row in all_rows(args, device):
            print(f"{row.mode} {row.name} {row.tactic}: {row.seconds * 1e6:.1f} us", file=sys.stderr, flush=True)
            rows.append(row)
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    if args.output:
        shown = [asdict(row) | {"share_of_ceiling": ceilings.share(row)} for row in rows]
        figures = {"device": machine, "torch": torch.__version__, "ceilings": asdict(ceilings), "rows": shown}
        args.output.write_text(json.dumps(figures, indent=1) + "\n")
    header = ("kernel", "tactic", "us", "rate", "of ceiling")
    cells = [
        (f"{row.mode} {row.name}", row.tactic, f"{row.seconds * 1e6:.1f}", row.rate, f"{ceilings.share(row):.0%}")
        for row in rows
    ]
    print(markdown_table(header, cells))
    print(
        f"{machine}, torch {torch.__version__}, reads at {ceilings.read_bytes / 1e12:.2f} TB/s, "
        f"multiplies {args.dtype} at {ceilings.operations / 1e12:.1f} TFLOP/s"
    )


def measure_ceilings(args: BenchArgs, device: torch.device) -> Ceilings:
    size = 8192 if device.type == "cuda" else 256
    left, right = (torch.randn(size, size, device=device).to(torch_dtype(args.dtype)) for _ in range(2))
    multiply = partial(torch.mm, left, right)
    multiply()
    (seconds,) = time_in_turns([[multiply] * 4], device)
    read_bytes = None if device.type == "cuda" else 64 * 2**20
    return Ceilings(measure_read_rate(device, num_bytes=read_bytes), 2 * size**3 / seconds)


def all_rows(args: BenchArgs, device: torch.device) -> Iterator[Row]:
    if "matmuls" in args.parts:
        for mode in args.modes:
            yield from matmul_rows(args, mode, device)
    if "small" in args.parts:
        for mode in args.modes:
            yield from small_rows(args, mode, device)
    for kv_dtype in (args.dtype, "int8"):
        if "decode" in args.parts:
            for batch_size in args.batch_size:
                for context in args.context:
                    step = StepShape(batch_size, batch_size, 0, 0, 1, context)
                    yield attention_row(args, f"decode {batch_size} x {context}", step, context, kv_dtype, device)
        if "prefill" in args.parts:
            for length in args.prompt:
                step = StepShape(length, 1, 1, length, length, length)
                yield attention_row(args, f"prompt {length}", step, length, kv_dtype, device)


def plan_of(args: BenchArgs, mode: str) -> Plan:
    """The network of one layer and of the logits, as an engine of this mode has it."""
    quant_mode, layout = MODES[mode]
    config = QWenConfig(
        architecture="QWenLMHeadModel",
        vocab_size=args.vocab_size,
        hidden_size=args.hidden_size,
        num_hidden_layers=1,
        num_attention_heads=args.num_heads,
        num_key_value_heads=args.num_kv_heads or args.num_heads,
        head_size=args.hidden_size // args.num_heads,
        mlp_hidden_size=args.intermediate_size // 2,
        norm_epsilon=1e-6,
        rotary_base=10000.0,
        seq_length=8192,
        max_position_embeddings=8192,
        use_dynamic_ntk=True,
        use_logn_attn=True,
        tie_word_embeddings=False,
    )
    model = QWenForCausalLM(config, args.dtype)
    quantize_model(model, quant_mode, **layout)
    return compile_model(model, Limits(64, 4096, 4096, 4096, TOKENS_PER_BLOCK)).plan


def matmul_rows(args: BenchArgs, mode: str, device: torch.device) -> Iterator[Row]:
    """Every candidate."""
    bench = replace(Bench.on(device), time=partial(time_in_turns, device=device, rounds=args.rounds))
    most_tokens = max(args.tokens)
    # Logits are wanted of one token a sequence.
    sizes = {"num_tokens": most_tokens, "num_logits": min(most_tokens, 64)}
    for measured in measure_matmuls(plan_of(args, mode), sizes, bench, only=args.tokens):
        yield from rows_of(measured, mode)


def rows_of(measured: Measured, mode: str) -> Iterator[Row]:
    shape = measured.shape
    name = f"{measured.name} {shape.rows} x {shape.depth}, {measured.tokens} tokens"
    for index, (tactic, seconds) in enumerate(measured.seconds.items()):
        star = "*" if index == 0 else ""
        yield Row(mode, name, f"{star}{tactic}", seconds, measured.moved_bytes, measured.operations)


def small_rows(args: BenchArgs, mode: str, device: torch.device) -> Iterator[Row]:
    """Norms and the quantization of activations. Their inputs come from the kernel before, and lie in the cache."""
    plan = plan_of(args, mode)
    specs, weight_names = specs_of(plan), frozenset(spec.name for spec in plan.weights)
    kernels = kernels_for(device)
    seen: dict[str, PlanNode] = {}
    for node in plan.nodes:
        if node.op in SMALL_OPS:
            seen.setdefault(f"{node.op} {specs[node.inputs[0]].shape[1]} {node.outputs[-1].dtype}", node)
    for name, node in seen.items():
        call = RandomCall(node, specs, weight_names, max(args.tokens), device)
        weights = call.prepared(kernels[node.op])
        for tokens in args.tokens:
            op = partial(call.run, kernels[node.op], tokens, weights)
            op()
            (seconds,) = time_in_turns([[op] * 20], device, args.rounds)
            yield Row(mode, f"{name}, {tokens} tokens", "", seconds, call.moved_bytes(tokens))


def attention_row(args: BenchArgs, name: str, step: StepShape, length: int, kv_dtype: str, device: torch.device) -> Row:
    """gpt_attention of equal sequences that are `length` tokens long after this step."""
    heads, kv_heads = args.num_heads, args.num_kv_heads or args.num_heads
    head_size = args.hidden_size // heads
    dtype = torch_dtype(args.dtype)
    vector_bytes = head_size + 4 if kv_dtype == "int8" else head_size * dtype.itemsize
    pool_bytes = 2 * step.batch_size * length * kv_heads * vector_bytes
    # q, k and v are read, the result is written; keys and values are read once, or written.
    moved = pool_bytes + step.num_tokens * (2 * heads + 2 * kv_heads) * head_size * dtype.itemsize
    new = step.num_tokens // step.batch_size
    scores = step.batch_size * heads * sum(range(length - new + 1, length + 1))
    kernel = kernels_for(device)["gpt_attention"]
    copies = range(copies_for(pool_bytes, device))
    ops = [make_attention(args, kernel, step, length, kv_dtype, device) for _ in copies]
    for op in ops:
        op()
    (seconds,) = time_in_turns([chain_of(ops, pool_bytes)], device, args.rounds)
    return Row(f"{kv_dtype} KV", name, "", seconds, moved, 4 * scores * head_size)


def make_attention(
    args: BenchArgs, kernel: Kernel, step: StepShape, length: int, kv_dtype: str, device: torch.device
) -> Op:
    """The op on a pool of its own, the blocks in random order."""
    heads, kv_heads = args.num_heads, args.num_kv_heads or args.num_heads
    head_size, dtype = args.hidden_size // heads, torch_dtype(args.dtype)
    blocks = -(-length // TOKENS_PER_BLOCK)
    shape = (1 + step.batch_size * blocks, 2, kv_heads, TOKENS_PER_BLOCK, head_size)
    if kv_dtype == "int8":
        pool = torch.randint(-127, 128, shape, dtype=torch.int8, device=device)
        scales = torch.full(shape[:-1], 1 / 64, device=device)
    else:
        pool, scales = torch.randn(shape, dtype=dtype, device=device), None
    tables = (torch.randperm(step.batch_size * blocks, device=device) + 1).int().view(step.batch_size, blocks)
    new = step.num_tokens // step.batch_size
    positions = torch.arange(length - new, length, dtype=torch.int32, device=device).repeat(step.batch_size)
    starts = torch.arange(step.batch_size + 1, dtype=torch.int32, device=device) * new
    lengths = torch.full((step.batch_size,), length, dtype=torch.int32, device=device)
    qkv = torch.randn(step.num_tokens, (heads + 2 * kv_heads) * head_size, dtype=dtype, device=device)
    return partial(
        kernel.run,
        qkv, pool, positions, starts, lengths, lengths, tables, scales, step=step, num_heads=heads,
        num_kv_heads=kv_heads, head_size=head_size, q_scaling=1.0, rotary_base=10000.0, rotary_dim=head_size,
        ntk_length=8192, logn_length=8192,
    )  # fmt: skip


if __name__ == "__main__":
    run_script(main, BenchArgs, __doc__)
