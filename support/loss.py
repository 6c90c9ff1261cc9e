"""The loss, computed in less memory."""

from collections.abc import Callable

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


def chunked_cross_entropy(
    head: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor, targets: torch.Tensor, n_chunks: int
) -> torch.Tensor:
    """The mean cross-entropy of hidden states (B, T, n_embd) and targets (B, T; -100 is ignored); `head`
    computes the logits.

    A row of 1,024 tokens has 206 MB of float32 logits, and several times that with their gradients. Here they
    exist for one chunk at a time; the backward pass recomputes them.
    """

    def summed(hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(head(hidden), targets, reduction="sum")

    chunks = zip(hidden.flatten(0, 1).chunk(n_chunks), targets.flatten().chunk(n_chunks), strict=True)
    losses = [checkpoint(summed, h, t, use_reentrant=False) for h, t in chunks]
    return sum(losses[1:], losses[0]) / (targets != -100).sum()
