"""Blocks have one owner, and all come back."""

import pytest

from tensorrt_llm.runtime.kv_cache import SCRATCH_BLOCK, BlockAllocator


def test_every_block_but_the_scratch_block_is_handed_out_once() -> None:
    blocks = BlockAllocator(8).allocate(7)
    assert sorted(blocks) == [1, 2, 3, 4, 5, 6, 7]
    assert SCRATCH_BLOCK not in blocks


def test_freed_blocks_can_be_owned_again() -> None:
    allocator = BlockAllocator(4)
    first = allocator.allocate(3)
    allocator.free(first[:2])
    assert sorted(allocator.allocate(2)) == sorted(first[:2])


def test_a_block_is_freed_once() -> None:
    allocator = BlockAllocator(4)
    blocks = allocator.allocate(1)
    allocator.free(blocks)
    with pytest.raises(AssertionError, match="not owned"):
        allocator.free(blocks)


@pytest.mark.parametrize("foreign", [0, 3, 4, -1])
def test_a_block_that_was_not_handed_out_is_not_taken_back(foreign: int) -> None:
    allocator = BlockAllocator(4)
    allocator.allocate(1)
    with pytest.raises(AssertionError, match="not owned"):
        allocator.free([foreign])


def test_more_blocks_than_are_free_are_not_handed_out() -> None:
    with pytest.raises(AssertionError, match="4 blocks asked for, 3 are free"):
        BlockAllocator(4).allocate(4)


def test_a_lost_block_is_noticed() -> None:
    allocator = BlockAllocator(4)
    allocator.check_balanced()
    allocator.allocate(2)
    with pytest.raises(RuntimeError, match="2 of 3 KV blocks did not come back"):
        allocator.check_balanced()


def test_a_cache_without_a_usable_block_is_refused() -> None:
    with pytest.raises(ValueError, match="has 1 blocks, expected at least 2"):
        BlockAllocator(1)
