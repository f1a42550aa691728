"""An engine on a device: weights, KV pools, and one step of a batch at a time.

Knows what a step reads and writes; which sequences take part, and which tokens follow, is decided elsewhere.
"""

import logging
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from ..dtype import itemsize, torch_dtype
from ..engine import Engine, EngineConfig
from ..kernels import compiler_starting, kernels_for, reference_kernels
from .batch import Batch
from .cuda_graph import CudaGraphPool
from .executor import Executor, InFrontOf
from .step_graphs import StepGraphs, room_for
from .step_inputs import StepInputs, pack
from .stored_tactics import stored_tactics

logger = logging.getLogger(__name__)

# Of the memory that is free beside the weights and the activations of a step; the rest is for captured graphs, for
# workspaces of cuBLAS and widened weights, and for others.
_KV_SHARE = {"cuda": 0.95, "cpu": 0.5}
# Beside an engine file: kernels that were compiled for it, for the next start.
KERNEL_FOLDER = "kernel_cache"


def pick_device(name: str | None = None) -> torch.device:
    """The device called `name`, by default CUDA when there is one."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device is {name!r}, expected cpu or cuda") from None
    if device.type not in _KV_SHARE:
        raise ValueError(f"device is {name!r}, expected cpu or cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is cuda, but this machine has no CUDA device that torch can use; expected cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device is {name}, but there are {torch.cuda.device_count()} CUDA devices")
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())  # torch wants a number where a device is made current
    return device


def prepare_device(device: torch.device) -> None:
    """What kernels rely on: the current device, and float32 sums in every matmul.

    Triton launches and graphs are captured on the current device. By default torch lets cuBLAS round partial sums of
    16-bit matmuls.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        torch.backends.cuda.matmul.allow_tf32 = False


class Session:
    """`run(batch)` computes one step. With `reference` it is interpreted in float32, the yardstick of debug runs."""

    def __init__(
        self,
        engine: Engine,
        device: torch.device | str | None = None,
        *,
        kv_cache_tokens: int | None = None,
        reference: bool = False,
        use_cuda_graphs: bool = True,
    ) -> None:
        self.config = engine.config
        self.plan = engine.plan
        self.device = device if isinstance(device, torch.device) else pick_device(device)
        if self.config.world_size > 1:
            raise ValueError(
                f"{self.config.engine_name} is one of {self.config.world_size} ranks; "
                f"running several ranks is not supported yet, build with --world_size 1 --tp_size 1"
            )
        with engine.checking_weights():
            with _timed("device made ready"):
                prepare_device(self.device)
            with _timed("kernels imported"):
                is_invariant = self.config.batch_invariant
                if reference:
                    kernels = reference_kernels()
                else:
                    tactics = stored_tactics(engine, self.device)
                    kernels = kernels_for(self.device, batch_invariant=is_invariant, tactics=tactics)
            with compiler_starting(self.device, engine.path and engine.path.parent / KERNEL_FOLDER):
                self._executor = Executor(engine.plan, engine.weights, kernels, self.device, float32=reference)
        is_float = self.config.kv_dtype != "int8"
        self._kv_dtype = "float32" if reference and is_float else self.config.kv_dtype
        self.num_blocks = self._count_blocks(kv_cache_tokens)
        with _timed(f"KV cache of {self.num_blocks} blocks made"):
            self._pools = self._allocate_pools()
        # Whether a step may be launched before the tokens of the last one are read. A CPU computes it while it is
        # launched, so there it would only bring tokens later.
        self.runs_ahead = self.device.type == "cuda"
        self._graphs: StepGraphs | None = None
        if self.device.type == "cuda" and use_cuda_graphs and not reference:
            pool = CudaGraphPool(self.device)
            self._graphs = StepGraphs(self._run_step, pool, self.config.limits, self.device)

    @torch.inference_mode()
    def run(self, batch: Batch, sampled_ids: torch.Tensor | None = None) -> torch.Tensor:
        """float32 logits [batch.num_logits, vocab_size] on the device, in row order; valid until the next run.

        `sampled_ids` are those of the last step, if one of its tokens is pending. A GPU is given the step and not
        waited for. It computes what it is given in that order, so whatever reads the logits and is launched before the
        next run reads these.
        """
        room = room_for(batch, self.config.limits) if self._graphs else None
        if self._graphs and room:
            logits = self._graphs.logits(batch, room, sampled_ids)
        else:
            logits = self._run_step(pack(batch, self.device, sampled_ids))
        return logits[:, : self.config.vocab_size]

    @torch.inference_mode()
    def capture_graphs(self) -> None:
        """Capture what steps so far would have had graphs for, had they come again: for after a warm-up."""
        if self._graphs:
            self._graphs.capture_seen()

    @torch.inference_mode()
    def run_marked(self, batch: Batch) -> dict[str, torch.Tensor]:
        """One step that keeps every marked tensor: debug name -> value, in the order of the network."""
        made = self._execute(pack(batch, self.device), keep=set(self.plan.marks.values()))
        return {name: made[tensor] for name, tensor in self.plan.marks.items() if tensor in made}

    def _run_step(self, inputs: StepInputs, in_front_of: InFrontOf = None) -> torch.Tensor:
        return self._execute(inputs, (), in_front_of)["logits"]

    def _execute(
        self, inputs: StepInputs, keep: Collection[str], in_front_of: InFrontOf = None
    ) -> dict[str, torch.Tensor]:
        return self._executor.run(inputs.tensors | self._pools, inputs.shape, keep, in_front_of)

    def _allocate_pools(self) -> dict[str, torch.Tensor]:
        return {
            f"{name}_{layer}": tensor
            for layer in range(self.config.num_layers)
            for name, tensor in new_pool(self.config, self.num_blocks, self._kv_dtype, self.device).items()
        }

    def _count_blocks(self, kv_cache_tokens: int | None) -> int:
        """Blocks of the pools with scratch block 0: as asked for, else what a full batch uses or memory holds."""
        limits = self.config.limits
        if kv_cache_tokens is not None:
            if kv_cache_tokens < 1:
                raise ValueError(f"kv_cache_tokens is {kv_cache_tokens}, expected at least 1")
            return 1 - (-kv_cache_tokens // limits.tokens_per_block)
        wanted = 1 + limits.max_batch_size * limits.max_blocks_per_seq
        bytes_per_token = self.config.kv_bytes_per_token // itemsize(self.config.kv_dtype) * itemsize(self._kv_dtype)
        free = _free_bytes(self.device) - self.config.activation_bytes
        affordable = int(max(free, 0) * _KV_SHARE[self.device.type]) // (bytes_per_token * limits.tokens_per_block)
        if affordable < 2:
            raise ValueError(
                f"no memory for the KV cache on {self.device}: {_free_bytes(self.device) / 2**30:.2f} GiB are free "
                f"beside the weights, a step of max_num_tokens={limits.max_num_tokens} takes up to "
                f"{self.config.activation_bytes / 2**30:.2f} GiB, a block of {limits.tokens_per_block} tokens "
                f"{bytes_per_token * limits.tokens_per_block / 2**30:.3f} GiB; free memory, or build with a smaller "
                f"--max_num_tokens"
            )
        if affordable < wanted:
            logger.info(
                "KV cache holds %d tokens, a full batch of the longest sequences would use %d: requests may wait",
                (affordable - 1) * limits.tokens_per_block,
                (wanted - 1) * limits.tokens_per_block,
            )
        return min(wanted, affordable)


@contextmanager
def _timed(what: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    logger.info("%s in %.2f s", what, time.perf_counter() - started)


def new_pool(config: EngineConfig, num_blocks: int, kv_dtype: str, device: torch.device) -> dict[str, torch.Tensor]:
    """The KV inputs of one layer, by their names without its number."""
    shape = (num_blocks, 2, config.num_kv_heads_per_rank, config.limits.tokens_per_block, config.head_size)
    # Zeros cost nothing on the CPU, where untouched pages are never made.
    pool = {"past_key_value": torch.zeros(shape, dtype=torch_dtype(kv_dtype), device=device)}
    if kv_dtype == "int8":
        pool["key_value_scales"] = torch.zeros(shape[:-1], device=device)
    return pool


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    # What the kernel can free counts too: after a build the page cache holds most of the memory.
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/meminfo has no MemAvailable; give kv_cache_tokens")
