"""A plan of TensorRT on a device, with the interface of session.py: one step of a batch at a time.

A sequence's cache is a slot, contiguous, and a slot is a block as the scheduler counts them: one that holds the longest
sequence, so none grows, and none is preempted. Block b is slot b - 1; the scratch block has none.

A step of the scheduler becomes several of TensorRT: each context is enqueued alone, with the address of its slot and
its exact length, then all decodes together:

    contexts | slot 4, 200 tokens |, | slot 1, 37 tokens |      profile PREFILL, a batch of one
    decodes  | slot 0 | slot 1 | slot 2 | ... one token each    profile DECODE, slots 0 to the last that decodes

A slot among these that does not decode computes a token of nobody, written where its next token will be, and so never
read. Which engine outputs are whose is decided by last_token_ids: logits come in the order of the rows.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from ..dtype import torch_dtype
from ..tensorrt_backend.plan_file import TensorRtEngine
from ..tensorrt_backend.shapes import DECODE, PREFILL, Shape, cache_names
from .batch import Batch, Row
from .cuda_graph import Captured, CudaGraphPool
from .transfers import staging, upload

logger = logging.getLogger(__name__)

# Addresses begin at multiples of 256 bytes.
_ALIGNED_INTS = 64


class TensorRtSession:
    """`run(batch)` computes one step. `trt` is NVIDIA's module; without a GPU only a stand-in for it can run."""

    def __init__(
        self, engine: TensorRtEngine, trt: Any, device: torch.device, *, kv_cache_tokens: int | None = None
    ) -> None:
        self.config = engine.config
        self.device = device
        if self.config.world_size > 1:
            raise ValueError(
                f"{engine.path.name} is one of {self.config.world_size} ranks; running several ranks is not supported "
                f"yet, build with --world_size 1 --tp_size 1"
            )
        self._shapes = engine.shapes
        self._num_slots = _count_slots(engine, kv_cache_tokens)
        self.num_blocks = 1 + self._num_slots
        # A GPU computes a step while the host prepares the next; see session.py.
        self.runs_ahead = device.type == "cuda"
        self._logger = trt.Logger(trt.Logger.WARNING)
        self._runtime = trt.Runtime(self._logger)
        self._engine = self._runtime.deserialize_cuda_engine(engine.read_plan())
        if self._engine is None:
            raise ValueError(
                f"{engine.path}: TensorRT {trt.__version__} cannot load it; it was built by {engine.tensorrt_version}, "
                f"and runs on that version and that kind of GPU: build it here again"
            )
        self._check_tensors(engine)
        self._caches = self._allocate_caches()
        self._num_cached = [0] * self._num_slots  # tokens of the last sequence in a slot
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        memory_bytes = max(self._engine.get_device_memory_size_for_profile_v2(index) for index in (PREFILL, DECODE))
        # All contexts compute here, one after the other.
        self._memory = torch.empty(max(memory_bytes, 1), dtype=torch.uint8, device=device)
        self._strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        self._prefill_context = self._new_context(PREFILL)
        # By batch size: a graph is valid as long as the context that it was captured of keeps its shapes.
        self._decode_contexts: dict[int, _Context] = {}
        self._decode_logits = self._new_logits(self._num_slots)
        self._graphs: dict[int, Captured] = {}
        self._graph_pool = CudaGraphPool(device) if device.type == "cuda" else None

    @torch.inference_mode()
    def run(self, batch: Batch, sampled_ids: torch.Tensor | None = None) -> torch.Tensor:
        """float32 logits [batch.num_logits, vocab_size] on the device, in row order; valid until the next run."""
        pieces = [logits for row in batch.contexts for logits in self._prefill(row)]
        if batch.decodes:
            pieces.append(self._decode(batch.decodes, sampled_ids))
        logits = pieces[0] if len(pieces) == 1 else torch.cat([self._new_logits(0), *pieces])
        return logits[:, : self.config.vocab_size]

    def capture_graphs(self) -> None:
        """Nothing is left to capture: a batch of decodes is captured behind its first run."""

    def _prefill(self, row: Row) -> Iterable[torch.Tensor]:
        """The logits that are asked for of a prompt, or of a piece of one."""
        wants_all = row.num_logits > 1
        length_at_once = self._shapes.max_logits if wants_all else self._shapes.max_prefill_length
        slot = _slot_of(row)
        for begin in range(0, row.length, length_at_once):
            ids = row.token_ids[begin : begin + length_at_once]
            start = row.start + begin
            if start == 0:
                self._clear_slot(slot)
            num_logits = len(ids) if wants_all else 1
            logits = self._new_logits(num_logits)
            context = self._prefill_context
            context.set_caches(self._caches, slot)
            context.set_address("logits", logits.data_ptr())
            context.set_shapes(self._shapes.inputs(self.config, 1, len(ids), num_logits))
            context.fill(
                {
                    "input_ids": ids,
                    "position_ids": range(start, start + len(ids)),
                    "kv_write_indices": [start],
                    "context_lengths": [row.request.context_length],
                    "last_token_ids": range(len(ids) - num_logits, len(ids)),
                }
            )
            self._execute_beside(context)
            self._num_cached[slot] = start + len(ids)
            if row.num_logits and (wants_all or begin + length_at_once >= row.length):
                yield logits

    def _decode(self, rows: Sequence[Row], sampled_ids: torch.Tensor | None) -> torch.Tensor:
        slots = [_slot_of(row) for row in rows]
        batch_size = self._decode_size(1 + max(slots))
        context = self._decode_context(batch_size)
        self._fill_decodes(context, rows, slots, batch_size, sampled_ids)
        if batch_size in self._graphs:
            self._graphs[batch_size].replay()
        else:
            self._execute_beside(context)
            if self._graph_pool:
                # The first run decided what a shape needs decided, which cannot be captured.
                self._graphs[batch_size] = self._graph_pool.capture(partial(self._captured_decode, context))
                logger.info("captured a graph of %d decodes, %d graphs now", batch_size, len(self._graphs))
        for slot in slots:
            self._num_cached[slot] += 1
        return self._decode_logits[: len(rows)]

    def _fill_decodes(
        self,
        context: "_Context",
        rows: Sequence[Row],
        slots: Sequence[int],
        batch_size: int,
        sampled_ids: torch.Tensor | None,
    ) -> None:
        token_ids, context_lengths = [0] * batch_size, [1] * batch_size
        places = self._num_cached[:batch_size]
        pending: list[tuple[int, int]] = []  # slots, and rows of sampled_ids
        for row, slot in zip(rows, slots, strict=True):
            assert row.start == places[slot], f"slot {slot} holds {places[slot]} tokens, a row begins at {row.start}"
            context_lengths[slot] = row.request.context_length
            if row.request.num_pending:
                pending.append((slot, row.request.sampled_row))
            else:
                token_ids[slot] = row.request.token_ids[-1]
        context.fill(
            {
                "input_ids": token_ids,
                "position_ids": places,
                "kv_write_indices": places,
                "context_lengths": context_lengths,
                "last_token_ids": slots,
            }
        )
        if pending:
            assert sampled_ids is not None, "a token is pending that no step has sampled"
            into, chosen = upload(pending, torch.int64, self.device).unbind(dim=1)
            context.values("input_ids")[into] = sampled_ids[chosen]

    def _decode_size(self, num_slots: int) -> int:
        """The next power of two: each size that comes is captured once."""
        return min(1 << (num_slots - 1).bit_length(), self._num_slots)

    def _decode_context(self, batch_size: int) -> "_Context":
        context = self._decode_contexts.get(batch_size)
        if context is None:
            context = self._decode_contexts[batch_size] = self._new_context(DECODE)
            context.set_address("logits", self._decode_logits.data_ptr())
            context.set_caches(self._caches, slot=0)
            context.set_shapes(self._shapes.inputs(self.config, batch_size, 1, batch_size))
        return context

    def _new_context(self, profile: int) -> "_Context":
        return _Context(self, self._engine.create_execution_context(self._strategy), profile)

    def _captured_decode(self, context: "_Context") -> torch.Tensor:
        context.execute(torch.cuda.current_stream(self.device).cuda_stream)
        return self._decode_logits

    def _clear_slot(self, slot: int) -> None:
        """The mask multiplies what it hides by zero, so a number must stand there, whatever a sequence before wrote."""
        for cache in self._caches.values():
            cache[slot].zero_()

    def _execute_beside(self, context: "_Context") -> None:
        """On a stream of its own, as TensorRT waits for the device on the default one; others wait for it in turn."""
        if self._stream is None:
            context.execute(0)
            return
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        context.execute(self._stream.cuda_stream)
        current.wait_stream(self._stream)

    def _new_logits(self, num_rows: int) -> torch.Tensor:
        return torch.empty(num_rows, self.config.vocab_size_padded, device=self.device)

    def _allocate_caches(self) -> dict[str, torch.Tensor]:
        config = self.config
        shape = (self._num_slots, config.num_kv_heads_per_rank, self._shapes.cache_length, config.head_size)
        dtype = torch_dtype(config.kv_dtype)
        names = cache_names(config)
        needed = len(names) * torch.Size(shape).numel() * dtype.itemsize
        free = torch.cuda.mem_get_info(self.device)[0] if self.device.type == "cuda" else None
        if free is not None and needed > free:
            raise ValueError(
                f"the caches of {self._num_slots} sequences of {self._shapes.cache_length} tokens take "
                f"{needed / 2**30:.2f} GiB, {free / 2**30:.2f} GiB are free on {self.device}; give fewer "
                f"kv_cache_tokens, or build with a smaller --max_batch_size"
            )
        # Of slots that wait for their first sequence, numbers are multiplied by zero as well (see _clear_slot).
        return {name: torch.zeros(shape, dtype=dtype, device=self.device) for name in names}

    def _check_tensors(self, engine: TensorRtEngine) -> None:
        """The plan must be of the network that its description describes."""
        found = {self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)}
        outputs = {"logits", *(f"present_{name}" for name in cache_names(engine.config))}
        wanted = outputs | set(engine.shapes.inputs(engine.config, 1, 1, 1))
        if found != wanted:
            raise ValueError(f"{engine.path}: inputs and outputs are {sorted(found)}, expected {sorted(wanted)}")


class _Context:
    """An execution context with one profile, and the memory of its integers: one buffer, a section for each input."""

    def __init__(self, session: TensorRtSession, context: Any, profile: int) -> None:
        self._context = context
        stream = session._stream.cuda_stream if session._stream else 0
        context.set_device_memory(session._memory.data_ptr(), session._memory.numel())
        if not context.set_optimization_profile_async(profile, stream):
            raise ValueError(f"TensorRT refuses profile {profile} of the plan")
        largest = {name: ranges.max for name, ranges in session._shapes.profiles(session.config)[profile].items()}
        self._sizes = {
            name: torch.Size(shape).numel() for name, shape in largest.items() if not name.startswith("past_")
        }
        self._starts: dict[str, int] = {}
        end = 0
        for name, size in self._sizes.items():
            self._starts[name] = end
            end += -(-size // _ALIGNED_INTS) * _ALIGNED_INTS
        self._integers = torch.zeros(end, dtype=torch.int32, device=session.device)
        for name in self._sizes:
            self.set_address(name, self.values(name).data_ptr())

    def values(self, name: str) -> torch.Tensor:
        return self._integers[self._starts[name] :][: self._sizes[name]]

    def fill(self, values: Mapping[str, Sequence[int]]) -> None:
        """Copy the integers of a step there, zeros behind them; a name that is no input of this engine is left out."""
        host = staging(len(self._integers), torch.int32, self._integers.device).zero_()
        for name, start in self._starts.items():
            host[start : start + len(values[name])] = torch.tensor(values[name], dtype=torch.int32)
        self._integers.copy_(host, non_blocking=True)

    def set_address(self, name: str, address: int) -> None:
        if not self._context.set_tensor_address(name, address):
            raise ValueError(f"TensorRT refuses the address of {name}")

    def set_caches(self, caches: Mapping[str, torch.Tensor], slot: int) -> None:
        """The caches from `slot` on, in and out."""
        for name, cache in caches.items():
            for side in ("past", "present"):
                self.set_address(f"{side}_{name}", cache[slot].data_ptr())

    def set_shapes(self, shapes: Mapping[str, Shape]) -> None:
        for name, shape in shapes.items():
            if not self._context.set_input_shape(name, shape):
                raise ValueError(f"TensorRT refuses {list(shape)} for {name}, outside of the plan's profile")

    def execute(self, stream: int) -> None:
        if not self._context.execute_async_v3(stream):
            raise RuntimeError("TensorRT did not run a step; its own log above says why")


def _count_slots(engine: TensorRtEngine, kv_cache_tokens: int | None) -> int:
    shapes = engine.shapes
    if kv_cache_tokens is None:
        return shapes.num_slots
    if kv_cache_tokens < shapes.cache_length:
        raise ValueError(
            f"kv_cache_tokens is {kv_cache_tokens}, expected at least {shapes.cache_length}: a sequence of this plan "
            f"has so many places"
        )
    return min(shapes.num_slots, kv_cache_tokens // shapes.cache_length)


def _slot_of(row: Row) -> int:
    (block,) = row.request.blocks
    return block - 1
