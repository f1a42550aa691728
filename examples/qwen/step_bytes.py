"""The bytes that a decode step must move: what a device that reads at a known rate could not be faster than.

A step reads every weight once, the embedding's rows of its tokens and not the table, and the keys and values of every
cached token; activations, which mostly stay in a cache, are not counted. Weights count as the engine file stores them.
"""

from dataclasses import dataclass
from typing import Any

from tensorrt_llm.runtime.engine_folder import AnyEngine


@dataclass(frozen=True)
class StepBytes:
    weights: int  # whatever the batch
    per_sequence: int  # the embedding of its newest token
    per_cached_token: int  # keys, values, and their scales

    def of(self, batch_size: int, context: float) -> float:
        """Bytes of a step of `batch_size` sequences, each of `context` tokens with the one of this step."""
        return self.weights + batch_size * (self.per_sequence + context * self.per_cached_token)


def step_bytes_of_engine(engine: AnyEngine) -> StepBytes:
    weights = {spec.name: spec for spec in engine.plan.weights}
    read: set[str] = set()
    embedding_bytes = 0
    for node in engine.plan.nodes:
        names = [name for name in node.inputs if name in weights]
        if node.op == "embedding":
            embedding_bytes += sum(weights[name].num_bytes // int(weights[name].shape[0]) for name in names)
        else:
            read.update(names)  # a table that the output layer shares is among them
    return StepBytes(sum(weights[name].num_bytes for name in read), embedding_bytes, engine.config.kv_bytes_per_token)


def step_bytes_of_hf(model: Any) -> StepBytes:
    """Of a transformers model with tables of its own for input and output, or one for both."""
    table, config = model.get_input_embeddings().weight, model.config
    all_bytes = sum(parameter.nbytes for parameter in model.parameters())  # a shared one is given once
    is_shared = model.get_output_embeddings().weight is table
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return StepBytes(
        weights=all_bytes if is_shared else all_bytes - table.nbytes,
        per_sequence=table.nbytes // len(table),
        per_cached_token=2 * config.num_hidden_layers * config.num_key_value_heads * head_size * table.itemsize,
    )
