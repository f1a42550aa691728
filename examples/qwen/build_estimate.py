"""What a build takes on the host, and its engine where it runs, before anything is built."""

import resource
import shutil
from dataclasses import dataclass
from pathlib import Path

from build_args import BuildArgs
from hf_checkpoint import READABLE_DTYPES, HfCheckpoint

from tensorrt_llm import Engine
from tensorrt_llm.dtype import itemsize

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
            host=int(_HEAP_SHARE * (peak_host_bytes() + largest * bytes_per_element)),
            disk=engine.weight_bytes * args.world_size,
            weights=engine.weight_bytes,
            kv_cache=engine.config.kv_bytes_per_token * limits.max_batch_size * limits.max_seq_len,
            activations=engine.config.activation_bytes,
        )

    def check_disk(self, output_dir: Path) -> None:
        existing = next(folder for folder in (output_dir.absolute(), *output_dir.absolute().parents) if folder.exists())
        free = shutil.disk_usage(existing).free
        if free < self.disk:
            raise ValueError(f"{output_dir}: the engine takes {gib(self.disk)}, the disk has {gib(free)} free")

    def __str__(self) -> str:
        device = self.weights + self.kv_cache + self.activations
        return "\n".join(
            (
                "Estimate, nothing was built:",
                f"  host memory to build   {gib(self.host)}",
                f"  disk                   {gib(self.disk)}",
                f"  device memory to run   {gib(device)}  (weights {gib(self.weights)}, KV cache of a full batch "
                f"{gib(self.kv_cache)}, activations {gib(self.activations)})",
            )
        )


def stored_dtype(args: BuildArgs) -> str:
    """The widest dtype among the tensors that this build reads."""
    if args.dummy_weights:
        return args.dtype
    found = {info.dtype for info in HfCheckpoint(args.hf_model_dir).tensors().values()}
    return max(found & set(READABLE_DTYPES), key=itemsize)


def peak_host_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"
