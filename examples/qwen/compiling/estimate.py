"""What a build takes on the host, and its engine where it runs, before anything is built."""

from dataclasses import dataclass

from host_memory import peak_host_bytes

from tensorrt_llm import Engine
from tensorrt_llm.disk import gib
from tensorrt_llm.dtype import itemsize

from .weight_source import WeightSource

# Tensors below 32 MB that are put together (q, k and v of Qwen2) or cast lie on the heap, which does not always reuse
# the place of the last one: builds of one checkpoint (1.8B, float16) peaked at 0.83 to 0.99 GiB for 0.80 in use.
_HEAP_SHARE = 1.1


# The verdict holds float32 activations of a text three times (the unquantized network's, and two of the quantized), and
# a few of a layer's tensors at once.
_COPIES_OF_A_TEXT = 20


@dataclass(frozen=True)
class Estimate:
    """What a build takes on the host, and what its engine takes where it runs; bytes, per rank but for the disk."""

    host: int
    disk: int
    weights: int
    kv_cache: int
    activations: int

    @classmethod
    def of(cls, engine: Engine, source: WeightSource) -> "Estimate":
        config, args = engine.config, source.args
        largest = max(spec.num_elements * (2 if spec.dtype == "uint8" else 1) for spec in engine.plan.weights)
        bytes_per_element = itemsize(source.stored_dtype)
        if source.stored_dtype != args.dtype:
            bytes_per_element += itemsize(args.dtype)
        # Torch itself, then the largest tensor: as the checkpoint's mapped file holds it, and as it is cast.
        host = peak_host_bytes() + largest * bytes_per_element
        if source.is_judged:
            host += _COPIES_OF_A_TEXT * args.accuracy_tokens * 4 * (config.hidden_size + config.inter_size)
        return cls(
            host=int(_HEAP_SHARE * host),
            disk=engine.weight_bytes * args.world_size,
            weights=engine.weight_bytes,
            kv_cache=config.kv_bytes_per_token * config.limits.max_batch_size * config.limits.max_seq_len,
            activations=config.activation_bytes,
        )

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
