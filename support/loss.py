"""
The loss: the mean cross-entropy of the next token, in nats.

Its logits are by far the largest tensors of a training step: a row of 1,024 tokens has 103 MB of them in
bfloat16. Three ways to compute the same number treat them with care.
"""

from collections.abc import Callable

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


def next_token_loss(
    lm_head: Callable[[torch.Tensor], torch.Tensor],
    hidden: torch.Tensor,
    targets: torch.Tensor,
    vocab_size: int,
    n_chunks: int = 1,
) -> torch.Tensor:
    """The mean cross-entropy over all targets, a scalar.

    Args:
        lm_head: hidden states (..., n_embd) to logits; columns from `vocab_size` on only pad the vocabulary.
        hidden: (B, T, n_embd).
        targets: (B, T) int64 token ids; -100 is ignored.
        n_chunks: above 1, the logits exist for one of so many chunks at a time, and the backward pass
            computes them again: less memory, more time.
    """
    hidden, targets = hidden.flatten(0, 1), targets.flatten()
    if n_chunks > 1:

        def summed(hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            return F.cross_entropy(lm_head(hidden)[:, :vocab_size], targets, reduction="sum")

        chunks = zip(hidden.chunk(n_chunks), targets.chunk(n_chunks), strict=True)
        losses = [checkpoint(summed, h, t, use_reentrant=False) for h, t in chunks]
        return sum(losses[1:], losses[0]) / (targets != -100).sum()
    logits = lm_head(hidden)
    if torch.compiler.is_compiling():
        return masked_cross_entropy(logits, targets, vocab_size)
    return F.cross_entropy(logits[:, :vocab_size], targets)


def masked_cross_entropy(logits: torch.Tensor, targets: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """The same as F.cross_entropy on the first `vocab_size` columns, written for the compiler.

    Its forward pass reads the logits once: the compiler finds maximum and sum of exponentials in one loop
    (online softmax: Milakov and Gimelshein, 2018), and the target's logit by comparing column numbers. Its
    backward pass reads and writes them once, in place. F.cross_entropy compiles to a backward pass with a
    useless sum over a one-hot matrix as large as the logits.

    Args:
        logits: (N, columns), float32 or narrower.
        targets: (N,) int64; -100 is ignored.
    """
    column = torch.arange(logits.size(-1), device=logits.device)
    logits = logits.float().masked_fill(column >= vocab_size, -torch.inf)
    of_target = torch.where(column == targets[:, None], logits, 0.0).sum(dim=-1)
    largest = logits.detach().amax(dim=-1, keepdim=True)
    total = (logits - largest).exp().sum(dim=-1, keepdim=True)
    losses = (largest + total.log()).squeeze(-1) - of_target
    counts = targets != -100
    return torch.where(counts, losses, 0.0).sum() / counts.sum()
