"""What quantization costs an engine: it and its unquantized network read the same text, node by node, side by side.

The quantized engine reads every text twice. The first copy runs on its own results, as it will in use, and gives the
logits that are compared. The second is set back to the unquantized network's results after each half of a layer, so
that the error seen there is of that half alone: an error made early is named where it is made.
"""

import heapq
import math
from collections.abc import Iterator, Sequence

import torch

from ..engine import Engine
from ..verdict import Gate, LayerError, Verdict
from .walk import Visit, walk

# Names, in a debug run, of what the two halves of a layer add to the residual stream.
_HALVES = (".attention", ".mlp")
_LAYERS_KEPT = 5
# Elements of one piece of logits, of which a few copies in float64 are made.
_LOGITS_AT_ONCE = 1 << 22


def measure_loss(
    quantized: Engine,
    unquantized: Engine,
    texts: Sequence[Sequence[int]],
    device: torch.device,
    *,
    text_name: str,
    reference_name: str,
    gate: Gate,
    loss_is_allowed: bool = False,
) -> Verdict:
    """Compare two engines of one model on `texts`, lists of token ids of two or more tokens each.

    An unquantized network whose activations are not finite is a ValueError.
    """
    assert texts and all(len(text) >= 2 for text in texts), "a text is read and has a next token"
    expected = walk(unquantized, texts, device, logits_of=len(texts))
    found = walk(quantized, [*texts, *texts], device, logits_of=2 * len(texts))
    num_tokens = sum(len(text) for text in texts)
    errors = []
    for mark, name in quantized.plan.marks.items():
        if mark.endswith(_HALVES):
            wanted = _result(expected, unquantized.plan.marks[mark])
            free_and_forced = _result(found, name)
            forced = free_and_forced[num_tokens:]
            if not wanted.isfinite().all():
                raise ValueError(
                    f"{mark}: the unquantized network makes infinite or NaN activations in "
                    f"{unquantized.config.precision}; build with bfloat16 or float32"
                )
            errors.append(LayerError(mark, _relative_error(forced, wanted)))
            forced.copy_(wanted)
    divergence = _compare_logits(
        _visit_of(expected, unquantized.plan.outputs["logits"]),
        _visit_of(found, quantized.plan.outputs["logits"]),
        texts,
        quantized.config.vocab_size,
    )
    return Verdict(
        reference=reference_name,
        text=text_name,
        num_tokens=divergence.num_tokens,
        mean_kl=divergence.kl / divergence.num_tokens,
        top1_agreement=divergence.agreements / divergence.num_tokens,
        perplexity=_perplexity(divergence.found_nll, divergence.num_tokens),
        unquantized_perplexity=_perplexity(divergence.expected_nll, divergence.num_tokens),
        # NaN is worse than any number.
        worst_layers=tuple(heapq.nlargest(_LAYERS_KEPT, errors, key=_badness)),
        gate=gate,
        loss_was_allowed=loss_is_allowed,
    )


class _Divergence:
    """Sums over tokens."""

    def __init__(self) -> None:
        self.num_tokens = 0
        self.agreements = 0
        self.kl = self.expected_nll = self.found_nll = 0.0


def _compare_logits(expected: Visit, found: Visit, texts: Sequence[Sequence[int]], vocab_size: int) -> _Divergence:
    """Next-token distributions of both at every token that has a next one, in pieces of rows."""
    sums = _Divergence()
    device = expected.reads[0].device
    # The last token of a text has no next one.
    targets = torch.tensor([token for text in texts for token in [*text[1:], -1]], device=device)
    rows_at_once = max(1, _LOGITS_AT_ONCE // vocab_size)
    for first in range(0, len(targets), rows_at_once):
        rows = slice(first, min(first + rows_at_once, len(targets)))  # behind them come the second copy's
        has_next = targets[rows] >= 0
        log_p, log_q = (
            visit.run(*(operand[rows] for operand in visit.reads))[0][has_next, :vocab_size].double().log_softmax(-1)
            for visit in (expected, found)
        )
        target = targets[rows][has_next][:, None]
        sums.num_tokens += len(target)
        sums.kl += ((log_p - log_q) * log_p.exp()).sum().item()
        sums.agreements += int((log_p.argmax(-1) == log_q.argmax(-1)).sum())
        sums.expected_nll -= log_p.gather(1, target).sum().item()
        sums.found_nll -= log_q.gather(1, target).sum().item()
    return sums


def _result(visits: Iterator[Visit], name: str) -> torch.Tensor:
    """Go on to the node that makes `name`, and run it."""
    visit = _visit_of(visits, name)
    return visit.results[[spec.name for spec in visit.node.outputs].index(name)]


def _visit_of(visits: Iterator[Visit], name: str) -> Visit:
    return next(visit for visit in visits if any(spec.name == name for spec in visit.node.outputs))


def _relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    norm = expected.float().norm().item()
    return (found.float() - expected.float()).norm().item() / norm if norm else math.nan


def _badness(layer: LayerError) -> float:
    return math.inf if math.isnan(layer.relative_error) else layer.relative_error


def _perplexity(nll: float, num_tokens: int) -> float:
    mean = nll / num_tokens
    return math.exp(mean) if mean < 700 else math.inf
