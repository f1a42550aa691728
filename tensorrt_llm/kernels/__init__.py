"""One registry: op -> the kernel that runs it on a device.

Every kernel has the signature of its reference. `prepare` turns an op's canonical weights into the layout that the
kernel wants, once, when an engine is loaded. Knows no graph and no request.
"""

import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import quantized_reference, reference
from .reference import BROKEN
from .step import StepShape
from .tactics import Tactics

logger = logging.getLogger(__name__)

__all__ = [
    "BROKEN",
    "Kernel",
    "StepShape",
    "compile_errors",
    "compiler_starting",
    "greedy_tokens_for",
    "kernels_for",
    "reference_kernels",
    "take_integers_for",
]


@dataclass(frozen=True)
class Kernel:
    """`run(*operands, **attributes)`; with `needs_step` it also takes step=StepShape.

    `prepare(*weights, **attributes)` is given the op's weight operands, which are the last ones; what it returns takes
    their place, and is the kernel's own affair.

    `run_in_splits` is `run` for a reader that `adds_splits` in its second operand: it may give float32 sums of parts of
    the depth, [splits, tokens, rows], which that one adds in order.
    """

    run: Callable[..., Any]
    prepare: Callable[..., tuple[Any, ...]] | None = None
    needs_step: bool = False
    run_in_splits: Callable[..., Any] | None = None
    adds_splits: bool = False


def reference_kernels() -> dict[str, Kernel]:
    """The meaning of every op of one rank, for any device and dtype."""
    return {
        "embedding": Kernel(reference.embedding),
        "rms_norm": Kernel(reference.rms_norm),
        "add_rms_norm": Kernel(reference.add_rms_norm),
        "matmul": Kernel(reference.matmul),
        "gated_mlp": Kernel(reference.gated_mlp),
        "add": Kernel(reference.add),
        "mul": Kernel(reference.mul),
        "silu": Kernel(reference.silu),
        "cast": Kernel(reference.cast),
        "gather_last_token": Kernel(reference.gather_last_token, needs_step=True),
        "gpt_attention": Kernel(reference.gpt_attention, needs_step=True),
        "weight_only_quant_matmul": Kernel(quantized_reference.weight_only_quant_matmul),
        "weight_only_gated_mlp": Kernel(quantized_reference.weight_only_gated_mlp),
        "quantize_per_token": Kernel(reference.quantize_per_token),
        "quantize_tensor": Kernel(quantized_reference.quantize_tensor),
        "rms_norm_quantize": Kernel(quantized_reference.rms_norm_quantize),
        "add_rms_norm_quantize": Kernel(quantized_reference.add_rms_norm_quantize),
        "smooth_quant_gemm": Kernel(quantized_reference.smooth_quant_gemm),
        "smooth_quant_gated_mlp": Kernel(quantized_reference.smooth_quant_gated_mlp),
        "scale_columns": Kernel(quantized_reference.scale_columns),
        "permute_columns": Kernel(quantized_reference.permute_columns),
    }


def kernels_for(
    device: torch.device, *, batch_invariant: bool = False, tactics: Tactics | None = None
) -> dict[str, Kernel]:
    """The kernels of `device`, over the reference where that is already the best there is.

    `tactics` say how CUDA multiplies where they were timed; without them heuristics do.
    With `batch_invariant` a row has the same bits in any step, on CUDA: for the CPU it is warned that nothing holds it.
    """
    if device.type == "cpu":
        from .cpu import cpu_kernels

        if batch_invariant:
            logger.warning("this engine is batch-invariant on CUDA only: on the CPU bits may depend on the batch")
        return reference_kernels() | cpu_kernels()
    if device.type == "cuda":
        from .cuda import cuda_kernels  # imports triton, which a CPU installation need not have

        return reference_kernels() | cuda_kernels(batch_invariant=batch_invariant, tactics=tactics)
    raise ValueError(f"no kernels for device {device}, expected cpu or cuda")


def greedy_tokens_for(device: torch.device) -> Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """`reference.greedy_tokens`, for one sampler on `device`. No op of a network: it comes after the logits."""
    if device.type == "cuda":
        from .cuda.greedy import GreedyTokens  # imports triton

        return GreedyTokens()
    return reference.greedy_tokens


def take_integers_for(device: torch.device) -> Callable[..., None]:
    """`reference.take_integers` on `device`. No op of a network: it comes before a step."""
    if device.type == "cuda":
        from .cuda.step_integers import take_integers  # imports triton

        return take_integers
    return reference.take_integers


@contextmanager
def compiler_starting(device: torch.device, folder: Path | None) -> Iterator[None]:
    """Get ready to compile kernels for `device` while the body runs, and keep them in `folder`; nothing for a CPU."""
    if device.type == "cpu":
        yield
        return
    from .cuda.compiled import keep_compiled_in, run_first_kernel  # imports triton

    if folder:
        keep_compiled_in(folder)
    with ThreadPoolExecutor(1) as pool:
        started = pool.submit(run_first_kernel, device)
        yield
        started.result()


def compile_errors(device: torch.device) -> tuple[type[Exception], ...]:
    """What the first call of a kernel raises that cannot be compiled for `device`, perhaps for too large tiles."""
    if device.type == "cpu":
        return ()
    from .cuda.compiled import TritonError  # imports triton

    return TritonError, RuntimeError
