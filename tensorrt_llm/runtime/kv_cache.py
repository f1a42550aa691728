"""Who owns which block of the KV cache.

The cache is a pool of equal blocks; a sequence holds a list of block ids, in the order of its tokens. This file knows
only the ids: the session holds the memory, the scheduler decides who gets blocks.
"""

# Steps that are padded to a fixed shape write their padding here, so no sequence may own it.
SCRATCH_BLOCK = 0


class BlockAllocator:
    """Hands out blocks 1 .. num_blocks - 1 and takes them back."""

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 2:
            raise ValueError(f"the KV cache has {num_blocks} blocks, expected at least 2: block 0 is scratch")
        self.capacity = num_blocks - 1
        self._free = list(range(num_blocks - 1, SCRATCH_BLOCK, -1))  # a stack: lately used blocks are used first
        self._is_owned = [False] * num_blocks

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self, count: int) -> list[int]:
        assert 0 <= count <= self.num_free, f"{count} blocks asked for, {self.num_free} are free"
        blocks = [self._free.pop() for _ in range(count)]
        for block in blocks:
            self._is_owned[block] = True
        return blocks

    def free(self, blocks: list[int]) -> None:
        for block in blocks:
            assert 0 < block <= self.capacity and self._is_owned[block], f"block {block} is not owned by anyone"
            self._is_owned[block] = False
        self._free.extend(reversed(blocks))

    def check_balanced(self) -> None:
        """Raise a RuntimeError if a block is still owned. For a moment in which nothing runs."""
        if self.num_free != self.capacity:
            lost = [block for block, is_owned in enumerate(self._is_owned) if is_owned]
            raise RuntimeError(f"{len(lost)} of {self.capacity} KV blocks did not come back: {lost[:8]}")
