"""What the host knows of a step without asking the device. Kernels size their grids by it."""

from typing import NamedTuple


class StepShape(NamedTuple):
    """Counts of one step. Sequences in their prompt (contexts) come first, then decodes of one token each."""

    num_tokens: int
    batch_size: int
    num_contexts: int
    num_context_tokens: int
    max_query_length: int
    max_sequence_length: int  # at least the longest sequence_length of the step
