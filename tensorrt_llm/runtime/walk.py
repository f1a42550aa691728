"""A plan run once over some texts, node by node, with one node's weights in memory at a time.

For what looks at a whole model without room for it: calibration, and the verdict on a quantized engine. Every token of
every text goes through a node before the next node is bound, so each weight is read once. The texts are whole prompts,
and a layer's cache is read by that layer only: all layers share one pool.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from ..engine import Engine
from ..kernels import kernels_for
from ..plan import PlanNode
from .batch import Batch, Row
from .executor import Call, bind_one_by_one
from .request import Request, SamplingConfig
from .session import new_pool, prepare_device
from .step_inputs import StepInputs, pack


class Visit:
    """A node whose operands are there. It runs when its results are asked for, or when the walk goes on."""

    def __init__(self, node: PlanNode, call: Call, reads: tuple[torch.Tensor, ...], attrs: dict[str, Any]) -> None:
        self.node = node
        self.reads = reads  # operands that are not weights
        self._call = call
        self._attrs = attrs
        self._results: tuple[torch.Tensor, ...] | None = None

    def run(self, *reads: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What the node makes of these operands."""
        made = self._call.run(*reads, *self._call.weights, **self._attrs)
        return made if len(self._call.makes) > 1 else (made,)

    @property
    def results(self) -> tuple[torch.Tensor, ...]:
        """What the rest of the network will read; writing into these tensors changes what follows."""
        if self._results is None:
            self._results = self.run(*self.reads)
        return self._results


def walk(engine: Engine, texts: Sequence[Sequence[int]], device: torch.device, logits_of: int = 0) -> Iterator[Visit]:
    """Visit every node of the engine's plan, in order, with all tokens of `texts`, packed; texts are token ids.

    What comes behind the gather sees the tokens of the first `logits_of` texts only.
    """
    with engine.checking_weights():
        prepare_device(device)
    # No inference mode here: between two visits it would hold for the caller, too. Nothing asks for gradients anyway.
    inputs = _prompts(texts, engine.config.limits.tokens_per_block, device, logits_of)
    values = {**inputs.tensors, **_shared_pool(engine, inputs, device)}
    kernels = kernels_for(device, batch_invariant=engine.config.batch_invariant)
    for node, call in bind_one_by_one(engine.plan, engine.weights.__getitem__, kernels, device):
        attrs = {**call.attrs, "step": inputs.shape} if call.needs_step else call.attrs
        visit = Visit(node, call, tuple(values[name] for name in call.reads), attrs)
        yield visit
        values |= zip(call.makes, visit.results, strict=True)
        for name in call.releases:
            del values[name]


def _prompts(texts: Sequence[Sequence[int]], tokens_per_block: int, device: torch.device, logits_of: int) -> StepInputs:
    rows = []
    next_block = 1
    for index, text in enumerate(texts):
        request = Request(index, list(text), SamplingConfig().for_sequence(0, 1))
        num_blocks = -(-len(text) // tokens_per_block)
        request.blocks = list(range(next_block, next_block + num_blocks))
        next_block += num_blocks
        rows.append(Row(request, start=0, length=len(text), num_logits=len(text) if index < logits_of else 0))
    return pack(Batch(tuple(rows)), device)


def _shared_pool(engine: Engine, inputs: StepInputs, device: torch.device) -> Mapping[str, torch.Tensor]:
    """The KV inputs of all layers, which are the same tensors."""
    config = engine.config
    num_blocks = 1 + int(inputs.tensors["block_tables"].max())
    pool = new_pool(config, num_blocks, config.kv_dtype, device)
    return {f"{name}_{layer}": tensor for name, tensor in pool.items() for layer in range(config.num_layers)}
