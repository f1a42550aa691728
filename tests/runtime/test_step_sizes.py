"""Sizes of steps hold what they are for, with little padding, and none where prompts come in whole tiles."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tensorrt_llm.runtime.step_sizes import decodes_size, mixed_sizes, prompt_sizes, prompt_tokens_in_whole_tiles


@given(st.integers(1, 3000))
def test_decodes_have_little_padding(count: int) -> None:
    assert count <= decodes_size(count) <= max(count + 7, count * 17 / 16 + 16)


@given(st.integers(1, 1024), st.integers(1, 4))
def test_prompts_have_little_padding(tokens: int, prompts: int) -> None:
    sizes = prompt_sizes(tokens, prompts)
    assert sizes and tokens <= sizes[0] <= max(tokens + 32, tokens * 4 / 3) and prompts <= sizes[1] < 2 * prompts


@pytest.mark.parametrize(("tokens", "prompts"), [(1025, 1), (5, 5)])
def test_long_and_many_prompts_have_no_size(tokens: int, prompts: int) -> None:
    assert prompt_sizes(tokens, prompts) is None


@given(st.integers(1, 1024), st.integers(1, 8), st.integers(1, 1024))
def test_mixed_steps_hold_what_they_are_for(tokens: int, prompts: int, decodes: int) -> None:
    sizes = mixed_sizes(tokens, prompts, decodes)
    assert sizes
    assert all(size >= count for size, count in zip(sizes, (tokens, prompts, decodes), strict=True))
    assert sizes[0] <= max(tokens + 63, tokens * 4 / 3)


@pytest.mark.parametrize(("tokens", "prompts"), [(1025, 1), (9, 9)])
def test_too_much_beside_decodes_has_no_size(tokens: int, prompts: int) -> None:
    assert mixed_sizes(tokens, prompts, 10) is None


@given(st.integers(0, 8192), st.integers(0, 3000))
def test_whole_tiles_are_full(most_tokens: int, decodes: int) -> None:
    tokens = prompt_tokens_in_whole_tiles(most_tokens, decodes)
    assert 0 <= tokens <= most_tokens
    padded = 0
    if decodes:
        sizes = mixed_sizes(1, 1, decodes)
        assert sizes
        padded = sizes[2]
    assert tokens == 0 or (padded + tokens) % 256 == 0
    assert most_tokens - tokens < 256 or padded + tokens >= max(1024, padded + 768), "as many as there may be"
    assert padded + tokens <= max(1024, padded + 768 + 255)
    if 0 < tokens <= 1024 and decodes:
        assert mixed_sizes(tokens, 8, decodes) == (tokens, 8, padded), "no padding beside prompts"
