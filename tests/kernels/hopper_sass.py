"""Compile, without a GPU, what the launchers would launch at Qwen-7B shapes on a Hopper GPU; print the facts as JSON.

Run as a program in a process without TRITON_INTERPRET: the launchers get tensors on the meta device, and in the place
of each kernel stands a recorder that compiles the call instead of launching it. Prints
{case: {kernel: {"registers": n, "stack": bytes, "shared": bytes, "opcodes": {opcode: count}, "fused_roundings": n}}}.
"""

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import product
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from tensorrt_llm.dtype import dtype_name
from tensorrt_llm.kernels import StepShape
from tensorrt_llm.kernels.cuda import (
    add_rms_norm,
    gated_mlp,
    quantize_per_token,
    smooth_quant_gated_mlp,
    smooth_quant_gemm,
    weight_only_quant_matmul,
)
from tensorrt_llm.kernels.cuda.attention import GptAttention
from tensorrt_llm.kernels.cuda.gated_mlp import gated_mlp_by, silu_mul
from tensorrt_llm.kernels.cuda.linear import matmul_by
from tensorrt_llm.kernels.cuda.smooth_quant import smooth_quant_gated_mlp_by, smooth_quant_gemm_by
from tensorrt_llm.kernels.cuda.weight_only import weight_only_gated_mlp_by, weight_only_quant_matmul_by
from tensorrt_llm.kernels.tactics import MatmulShape, Tactic, Tactics, bucket_of, candidates
from tensorrt_llm.kernels.tactics.weight_only import stream, tiles

HOPPER = GPUTarget("cuda", 90, 32)
POINTERS = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16",
    torch.float64: "*fp64", torch.int32: "*i32", torch.int16: "*i16", torch.int8: "*i8",
}  # fmt: skip
KERNELS = (
    ("dense", "_stream_rows"),
    ("dense", "_multiply_tiles"),
    ("norm", "_rms_norm"),
    ("gated_mlp", "_silu_mul"),
    ("rope_kv", "_rope_kv"),
    ("decode_one_head", "_decode_one_head"),
    ("decode_grouped_heads", "_decode_grouped_heads"),
    ("decode_grouped_heads", "_combine_splits"),
    ("prefill_attention", "_prefill"),
    ("weight_only", "_stream_rows"),
    ("weight_only", "_multiply_tiles"),
    ("epilogue", "_add_splits"),
    ("weight_only", "_widen"),
    ("resident_stream", "_resident_rows"),
    ("ring_stream", "_ring_rows"),
    ("ring_tiles", "_ring_tiles"),
    ("wgmma_tiles", "_wgmma_tiles"),
    ("wgmma_plain", "_wgmma_plain"),
    ("smooth_quant", "_quantize"),
    ("smooth_quant", "_stream_rows"),
    ("smooth_quant", "_multiply_tiles"),
)
OPTIONS = ("num_warps", "num_stages", "launch_pdl", "maxnreg")
AS_ON_HOPPER = {
    "overlapping": lambda device, is_early=True: {"OVERLAP": is_early, "launch_pdl": is_early},
    "has_dependent_launch": lambda device: True,
    "has_warpgroups": lambda device: True,
}
PREFILL = StepShape(4096, 2, 2, 4096, 2048, 2048)
DECODE = StepShape(32, 32, 0, 0, 1, 2048)
SHORT_DECODE = StepShape(1, 1, 0, 0, 1, 128)
LONG_DECODE = StepShape(1, 1, 0, 0, 1, 2048)
SOME_DECODES = StepShape(8, 8, 0, 0, 1, 2048)
SHORT_DECODES = StepShape(32, 32, 0, 0, 1, 512)
THRONG = StepShape(160, 160, 0, 0, 1, 2048)
NVDISASM = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "nvdisasm")


class Recorder:
    """Stands for a kernel: kernel[grid](...) compiles for Hopper with the specialisations the JIT would choose."""

    def __init__(self, kernel: Any, facts: dict[str, Any]) -> None:
        self.kernel, self.facts = kernel, facts

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self.compile

    def compile(self, *args: Any, **kwargs: Any) -> None:
        options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
        values = dict(zip(self.kernel.arg_names, args, strict=False)) | kwargs | options
        signature: dict[str, str] = {}
        constants: dict[tuple[int, ...], Any] = {}
        attributes: dict[tuple[int, ...], list[list[Any]]] = {}
        for index, parameter in enumerate(self.kernel.params):
            value = values[parameter.name]
            is_specialized = not parameter.do_not_specialize
            if parameter.is_constexpr or value is None or (type(value) is int and value == 1 and is_specialized):
                signature[parameter.name], constants[(index,)] = "constexpr", value
                continue
            if isinstance(value, torch.Tensor):
                signature[parameter.name] = POINTERS[value.dtype]
            elif isinstance(value, TensorDescriptor):
                block = f"{POINTERS[value.base.dtype][1:]}{list(value.block_shape)}"
                signature[parameter.name] = f"tensordesc<{block},{value.layout!r}>"
            else:
                is_wide = abs(value) >= 2**31
                signature[parameter.name] = "fp32" if isinstance(value, float) else "i64" if is_wide else "i32"
            if isinstance(value, torch.Tensor):
                is_aligned = not parameter.do_not_specialize_on_alignment
            else:
                is_aligned = type(value) is int and value % 16 == 0 and is_specialized
            if is_aligned:
                attributes[(index,)] = [["tt.divisibility", 16]]
        kind = GluonASTSource if isinstance(self.kernel, GluonJITFunction) else ASTSource
        source = kind(self.kernel, signature, constants, attributes)
        self.facts[self.kernel.__name__] = read_sass(triton.compile(source, target=HOPPER, options=options))


def read_sass(compiled: Any) -> dict[str, Any]:
    """What the machine code does: registers, spilled bytes, shared memory, and how often each opcode occurs."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        text = subprocess.run([NVDISASM, "-c", cubin.name], check=True, capture_output=True, text=True).stdout
        usage = subprocess.run(
            [NVDISASM.replace("nvdisasm", "cuobjdump"), "-res-usage", cubin.name], capture_output=True, text=True
        )
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage.stdout + usage.stderr).groups()
    sequence = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", text, re.MULTILINE)
    opcodes = Counter(sequence)
    return {
        "registers": int(registers),
        "stack": int(stack),
        "shared": compiled.metadata.shared,
        "opcodes": dict(opcodes),
        # Up to the wait for the kernel in front; None: it is launched after that one, and waits for nothing.
        "before_wait": sequence[: sequence.index("ACQBULK")] if "ACQBULK" in sequence else None,
        "fused_roundings": len(re.findall(r"FFMA.*12582912", text)),  # int8_rows.py has the number and the reason
    }


@contextmanager
def recording() -> Iterator[dict[str, Any]]:
    """Put recorders in the place of the kernels, with early launches as on Hopper; yield what they write to."""
    facts: dict[str, Any] = {}
    stands_for: list[tuple[Any, str, Any]] = []
    for file, name in KERNELS:
        module = importlib.import_module(f"tensorrt_llm.kernels.cuda.{file}")
        stands_for.append((module, name, Recorder(getattr(module, name), facts)))
    for module in {module for module, _, _ in stands_for}:
        stands_for += [(module, name, stand_in) for name, stand_in in AS_ON_HOPPER.items() if hasattr(module, name)]
    replaced = [(module, name, getattr(module, name)) for module, name, _ in stands_for]
    for module, name, stand_in in stands_for:
        setattr(module, name, stand_in)
    yield facts
    for module, name, original in replaced:
        setattr(module, name, original)


def attend(dtype: torch.dtype, kv_dtype: torch.dtype, step: StepShape, heads: int, kv_heads: int) -> None:
    """One gpt_attention call with heads of 128, a pool of more than 2^31 elements, and NTK and log-n on."""
    pool = (8192, 2, kv_heads, 64, 128)

    def ints(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.int32, device="meta")

    batch, tokens = step.batch_size, step.num_tokens
    GptAttention(is_batch_invariant=False)(
        torch.empty((tokens, (heads + 2 * kv_heads) * 128), dtype=dtype, device="meta"),
        torch.empty(pool, dtype=kv_dtype, device="meta"),
        ints(tokens), ints(batch + 1), ints(batch), ints(batch), ints(batch, 128),
        torch.empty(pool[:-1], device="meta") if kv_dtype == torch.int8 else None,
        step=step, num_heads=heads, num_kv_heads=kv_heads, head_size=128, rotary_base=10000.0, rotary_dim=128,
        ntk_length=2048, logn_length=2048,
    )  # fmt: skip


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def multiply_int4(x: torch.Tensor, dtype: str) -> None:
    """The gated MLP, with groups of 128 and zero points: 16 blocks of 64 words a row. For one token it is a stream, for
    512 the weight is widened.
    """
    groups, rows = 4096 // 128, 2 * 11008
    scale, zero = empty(groups, rows, dtype=torch.float16), empty(groups, rows, dtype=torch.int16)
    words = empty(rows, 16 * 64, dtype=torch.int16)
    shape = MatmulShape("weight_only_gated_mlp", rows, 4096, x.dtype, 4, groups, has_zero=True)
    tactics = Tactics({(shape, 1): stream(shape), (shape, 512): Tactic("widened")})
    weight_only_gated_mlp_by(tactics, x, words, scale, zero, bits=4, has_zero=True, dtype=dtype)


def multiply_int8(x: torch.Tensor, dtype: str) -> None:
    """A projection with bias and a scale for each row: 32 blocks of words; several tokens in tiles that come late."""
    words, bias = empty(12288, 32 * 64, dtype=torch.int16), empty(12288, dtype=x.dtype)
    shape, tokens = MatmulShape("weight_only_quant_matmul", 12288, 4096, x.dtype, 8), x.shape[0]
    tactics = Tactics({(shape, tokens): tiles(shape, tokens)} if tokens > 1 else {})
    attributes = dict(bits=8, has_zero=False, dtype=dtype)
    weight_only_quant_matmul_by(tactics, x, words, empty(1, 12288), None, bias, **attributes)


def multiply_through_rings(rows: int, depth: int, bits: int) -> Iterator[tuple[str, Callable[[], None]]]:
    """Every ring among the candidates of a shape, by a name for it."""
    is_gated, groups = rows > depth * 4, depth // 128 if bits == 4 else 1
    op = "weight_only_gated_mlp" if is_gated else "weight_only_quant_matmul"
    shape = MatmulShape(op, rows, depth, torch.float16, bits, groups)
    words = empty(rows, -(-depth * bits // 1024) * 64, dtype=torch.int16)
    weight = words, empty(groups, rows, dtype=torch.float16 if bits == 4 else torch.float32), None
    x, attributes = empty(1, depth, dtype=torch.float16), dict(bits=bits, has_zero=False, dtype="float16")
    for number, tactic in enumerate(ring for ring in candidates(shape, 1) if ring.way == "ring"):
        tactics = Tactics({(shape, 1): tactic})
        if is_gated:
            call = partial(weight_only_gated_mlp_by, tactics, x, *weight, **attributes)
        else:
            call = partial(weight_only_quant_matmul_by, tactics, x, *weight, None, **attributes)
        yield f"ring_{rows}_{depth}_int{bits}_{number}", call


def multiply_in_ring_tiles(tokens: int, dtype: torch.dtype, bits: int) -> Iterator[tuple[str, Callable[[], None]]]:
    """The gated MLP of 8 tokens as it is chosen, of more in all candidates, by a name for it; bits 0 are those of x."""
    rows, depth, name = 22016, 4096, str(dtype).removeprefix("torch.")
    is_integer, groups = dtype == torch.int8, depth // 128 if bits == 4 else 1
    op = "smooth_quant_gated_mlp" if is_integer else "weight_only_gated_mlp" if bits else "gated_mlp"
    shape = MatmulShape(op, rows, depth, dtype, bits, groups)
    x = empty(tokens, depth, dtype=dtype)
    found = [tactic for tactic in candidates(shape, tokens) if tactic.way == "ring_tiles"]
    for number, tactic in enumerate(found if tokens > 8 else found[:1]):
        tactics = Tactics({(shape, tokens): tactic})
        if is_integer:
            weight = empty(rows, depth, dtype=dtype), empty(rows)
            call = partial(smooth_quant_gated_mlp_by, tactics, x, empty(tokens, 1), *weight, dtype="float16")
        elif bits:
            words, scale = empty(rows, depth * bits // 16, dtype=torch.int16), empty(groups, rows, dtype=torch.float16)
            attributes = dict(bits=bits, has_zero=False, dtype="float16")
            call = partial(weight_only_gated_mlp_by, tactics, x, words, scale, None, **attributes)
        else:
            call = partial(gated_mlp_by, tactics, x, empty(rows, depth, dtype=dtype), dtype=name)
        yield f"ring_tiles_{name}_{bits}_{tokens}_{number}", call


def multiply_on_warpgroups() -> Iterator[tuple[str, Callable[[], None]]]:
    """Every tile of warpgroups: for the gated MLP in int4, and for a projection with bias, in splits in bfloat16."""
    for (token_tile, row_tile), (bits, dtype) in product(
        ((128, 128), (128, 192), (256, 128)), ((4, torch.float16), (8, torch.float16), (8, torch.bfloat16))
    ):
        is_gated, groups = bits == 4, 4096 // 128 if bits == 4 else 1
        rows, op = (22016, "weight_only_gated_mlp") if is_gated else (4096, "weight_only_quant_matmul")
        shape = MatmulShape(op, rows, 4096, dtype, bits, groups, has_zero=is_gated)
        tactic = Tactic("wgmma", token_tile, row_tile, num_splits=2 if dtype == torch.bfloat16 else 1)
        tactics, name = Tactics({(shape, bucket_of(256)): tactic}), dtype_name(dtype)
        words, x = empty(rows, 4096 * bits // 16, dtype=torch.int16), empty(256, 4096, dtype=dtype)
        if is_gated:
            scale, zero = empty(groups, rows, dtype=torch.float16), empty(groups, rows, dtype=torch.int16)
            call = partial(weight_only_gated_mlp_by, tactics, x, words, scale, zero, bits=4, has_zero=True, dtype=name)
        else:
            weight = words, empty(1, rows), None, empty(rows, dtype=dtype)
            call = partial(weight_only_quant_matmul_by, tactics, x, *weight, bits=8, has_zero=False, dtype=name)
        yield f"wgmma_{token_tile}_{row_tile}_int{bits}_{name}", call


def multiply_plain_on_warpgroups() -> Iterator[tuple[str, Callable[[], None]]]:
    """Every tile of operands that are multiplied as they are: the gated MLP, and projections with bias."""
    for (token_tile, row_tile), (dtype, num_splits) in product(
        ((128, 128), (128, 192), (256, 128), (256, 192)),
        ((torch.float16, 1), (torch.bfloat16, 2), (torch.int8, 1), (torch.int8, 2)),
    ):
        tactic, name = Tactic("wgmma", token_tile, row_tile, num_splits=num_splits), str(dtype)
        x = empty(256, 4096, dtype=dtype)
        if dtype == torch.float16:
            tactics = Tactics({(MatmulShape("gated_mlp", 22016, 4096, dtype), 256): tactic})
            call = partial(gated_mlp_by, tactics, x, empty(22016, 4096, dtype=dtype), dtype="float16")
        elif dtype == torch.bfloat16:
            tactics = Tactics({(MatmulShape("matmul", 4096, 4096, dtype), 256): tactic})
            weight, bias = empty(4096, 4096, dtype=dtype), empty(4096, dtype=dtype)
            call = partial(matmul_by, tactics, x, weight, bias, dtype="bfloat16")
        else:
            tactics = Tactics({(MatmulShape("smooth_quant_gemm", 4096, 4096, dtype, 8), 256): tactic})
            weight, bias = empty(4096, 4096, dtype=dtype), empty(4096, dtype=torch.float16)
            operands = x, empty(256, 1), weight, empty(4096), bias
            call = partial(smooth_quant_gemm_by, tactics, *operands, dtype="float16")
        yield f"plain_{token_tile}_{row_tile}_{name.removeprefix('torch.')}_{num_splits}", call


def multiply_integers(tokens: int, dtype: str) -> None:
    """A projection in W8A8, for one token, or the gated MLP."""
    x, x_scale = empty(tokens, 4096, dtype=torch.int8), empty(tokens, 1)
    if tokens == 1:
        smooth_quant_gemm(x, x_scale, empty(4096, 4096, dtype=torch.int8), empty(4096), dtype=dtype)
    else:
        smooth_quant_gated_mlp(x, x_scale, empty(22016, 4096, dtype=torch.int8), empty(22016), dtype=dtype)


def compile_all() -> dict[str, Any]:
    cases: dict[str, Any] = {}
    for name, dtype in (("float16", torch.float16), ("bfloat16", torch.bfloat16), ("float32", torch.float32)):
        for case, step, heads, kv_heads in (
            ("prefill", PREFILL, 32, 32),
            ("decode", DECODE, 32, 32),
            ("short_decode", SHORT_DECODE, 32, 32),
            ("long_decode", LONG_DECODE, 32, 32),
            ("some_decodes", SOME_DECODES, 32, 32),
            ("short_decodes", SHORT_DECODES, 32, 32),
            ("grouped_decode", DECODE, 28, 4),
        ):
            with recording() as cases[f"{case}_{name}"]:
                attend(dtype, dtype, step, heads, kv_heads)
        with recording() as cases[f"norm_{name}"]:
            x = torch.empty((4, 4096), device="meta")
            y, weight = x.to(dtype), torch.empty(4096, dtype=dtype, device="meta")
            add_rms_norm(x, y, weight, eps=1e-6, dtype=name)
            silu_mul(torch.empty((4, 2 * 11008), dtype=dtype, device="meta"), dtype=name)
        with recording() as cases[f"norm_of_splits_{name}"]:
            add_rms_norm(x, empty(2, 4, 4096), weight, eps=1e-6, dtype=name)
    compile_quantized(cases)
    return cases


def compile_quantized(cases: dict[str, Any]) -> None:
    half, brain = torch.float16, torch.bfloat16
    for case, step, kv_heads in (
        ("prefill", PREFILL, 32),
        ("decode", DECODE, 32),
        ("short_decode", SHORT_DECODE, 32),
        ("long_decode", LONG_DECODE, 32),
        ("some_decodes", SOME_DECODES, 32),
        ("short_decodes", SHORT_DECODES, 32),
        ("throng", THRONG, 32),
        ("grouped_decode", DECODE, 4),
    ):
        with recording() as cases[f"{case}_float16_int8"]:
            attend(half, torch.int8, step, 32, kv_heads)
    for tokens in (1, 32):
        with recording() as cases[f"dense_{tokens}_float16"]:
            weight = empty(2 * 11008, 4096, dtype=half)
            gated_mlp(empty(tokens, 4096, dtype=half), weight, dtype="float16")
    for name, dtype, tokens in (*(("float16", half, tokens) for tokens in (1, 16, 64)), ("bfloat16", brain, 16)):
        with recording() as cases[f"int4_{tokens}_{name}"]:
            multiply_int4(empty(tokens, 4096, dtype=dtype), name)
        with recording() as cases[f"int8_{tokens}_{name}"]:
            multiply_int8(empty(tokens, 4096, dtype=dtype), name)
    with recording() as cases["widened_float16"]:
        multiply_int4(empty(512, 4096, dtype=half), "float16")
    for rows, depth, bits in ((12288, 4096, 4), (22016, 4096, 4), (4096, 11008, 4), (22016, 4096, 8)):
        for case, call in multiply_through_rings(rows, depth, bits):
            with recording() as cases[case]:
                call()
    for dtype, bits in ((half, 0), (brain, 0), (torch.int8, 8), (half, 8), (half, 4)):
        for tokens in (8, 32):
            for case, call in multiply_in_ring_tiles(tokens, dtype, bits):
                with recording() as cases[case]:
                    call()
    for case, call in (*multiply_on_warpgroups(), *multiply_plain_on_warpgroups()):
        with recording() as cases[case]:
            call()
    with recording() as cases["resident_float16"]:
        words, x = empty(4096, 32 * 64, dtype=torch.int16), empty(1, 4096, dtype=half)
        weight_only_quant_matmul(x, words, empty(1, 4096), None, None, bits=8, has_zero=False, dtype="float16")
    for tokens in (1, 64, 512):
        with recording() as cases[f"w8a8_{tokens}_float16"]:
            multiply_integers(tokens, "float16")
    with recording() as cases["quantize_float16"]:
        quantize_per_token(empty(4, 11008, dtype=half), empty(11008))


if __name__ == "__main__":
    json.dump(compile_all(), sys.stdout)
