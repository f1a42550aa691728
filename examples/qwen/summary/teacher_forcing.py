"""What a backend makes of reference texts that it is made to follow: how likely they are to it, and how far its
next-token distributions are from those of another backend.

The positions are those of the references' tokens, each given all that stands before it. Knows ids only, no text.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from backends import Backend

from .tasks import Task


@dataclass(frozen=True)
class Following:
    """One backend along the references; lists hold one item for each article."""

    num_tokens: list[int]
    nll: list[float]  # negative log-likelihood of all tokens of a reference
    likeliest: list[torch.Tensor]  # the most likely token at each position
    logits: dict[int, torch.Tensor]  # article -> float32 [tokens, vocab], of those that were to be kept
    kl: dict[int, float]  # article -> KL(other || this) in nats, the sum over its tokens

    @property
    def perplexity(self) -> float:
        return float(np.exp(sum(self.nll) / sum(self.num_tokens)))  # not math.exp: a broken engine's may be inf

    @property
    def mean_kl(self) -> float:
        """Nats per token."""
        return sum(self.kl.values()) / sum(self.num_tokens[article] for article in self.kl)

    def kl_by_article(self) -> np.ndarray:
        """One value for each compared article, whose mean is `mean_kl`.

        That is a ratio of two sums. Here it is linearized: what an article adds to KL, less what its length alone
        would add, over the mean length. The spread of these values is that of the ratio.
        """
        tokens = np.array([self.num_tokens[article] for article in self.kl])
        return self.mean_kl + (np.array(list(self.kl.values())) - self.mean_kl * tokens) / tokens.mean()

    def agreement(self, other: "Following") -> float:
        """Share of all positions at which both name the same token."""
        pairs = zip(self.likeliest, other.likeliest, strict=True)
        return sum(int((ours == theirs).sum()) for ours, theirs in pairs) / sum(self.num_tokens)


def follow_references(
    backend: Backend,
    tasks: Iterable[Task],
    keep: Collection[int] = (),
    compare_with: Mapping[int, torch.Tensor] | None = None,
) -> Following:
    """Keep the logits of the articles numbered in `keep`; measure KL for those whose logits are in `compare_with`."""
    following = Following([], [], [], {}, {})
    for article, task in enumerate(tasks):
        # The row of a token scores the next one.
        logits = backend.logits(task.scored_prompt + task.reference)[len(task.scored_prompt) - 1 : -1]
        log_probs = logits.double().log_softmax(-1)
        target = torch.tensor(task.reference)[:, None]
        following.num_tokens.append(len(task.reference))
        following.nll.append(-log_probs.gather(-1, target).sum().item())
        following.likeliest.append(logits.argmax(-1))
        if article in keep:
            following.logits[article] = logits.clone()  # not the rows of the prompt, which lie in the same memory
        if compare_with and article in compare_with:
            following.kl[article] = _divergence(compare_with[article].double().log_softmax(-1), log_probs)
    return following


def _divergence(log_p: torch.Tensor, log_q: torch.Tensor) -> float:
    return ((log_p - log_q) * log_p.exp()).sum().item()


def articles_within(num_bytes: float, tasks: Sequence[Task], vocab_size: int) -> list[int]:
    """As many articles, evenly spread and at least one, as have room for their logits."""
    largest = max(len(task.reference) for task in tasks) * vocab_size * torch.float32.itemsize
    count = min(len(tasks), max(1, int(num_bytes // largest)))
    return [int(article) for article in np.linspace(0, len(tasks) - 1, count).round()]
