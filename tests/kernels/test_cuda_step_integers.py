"""The kernel that hands a step its integers, against its reference: any sizes, tokens known and pending."""

import pytest
import torch

pytest.importorskip("triton", reason="the CUDA kernels need triton")

from tensorrt_llm.kernels import reference
from tensorrt_llm.kernels.cuda.step_integers import take_integers


@pytest.mark.parametrize(
    ("num_tokens", "num_others", "num_sampled", "rows"),
    [(1, 0, 1, 1), (3, 40, 8, 2), (300, 1000, 256, 256), (1025, 3000, 16, 7)],
)
@pytest.mark.parametrize("has_sampled", [True, False])
def test_pending_tokens_get_the_ids_that_were_sampled(
    device: torch.device, num_tokens: int, num_others: int, num_sampled: int, rows: int, has_sampled: bool
) -> None:
    ids = torch.randint(0, 1000, (num_tokens,), dtype=torch.int32)
    sources = torch.arange(num_sampled, num_sampled + num_tokens, dtype=torch.int32)
    pending = torch.rand(num_tokens) < 0.5
    pending[0] = has_sampled
    if has_sampled:
        sources = torch.where(pending, torch.randint(0, rows, (num_tokens,), dtype=torch.int32), sources)
    others = torch.randint(-5, 1000, (num_others,), dtype=torch.int32)
    integers = torch.cat((ids, sources, others)).to(device)
    sampled = torch.randint(2000, 3000, (rows,), dtype=torch.int32, device=device) if has_sampled else None
    found, wanted = (torch.full_like(integers, -7) for _ in range(2))
    take_integers(found, integers, num_tokens, sampled, num_sampled)
    reference.take_integers(wanted, integers, num_tokens, sampled, num_sampled)
    assert torch.equal(found, wanted)
    if sampled is not None:
        assert torch.equal(
            found[:num_tokens].cpu(), torch.where(pending, sampled.cpu()[sources.clamp(max=rows - 1)], ids)
        )
    assert torch.equal(found[num_tokens:], integers[num_tokens:])
