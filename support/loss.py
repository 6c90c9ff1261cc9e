"""
The loss: the mean cross-entropy of the next token, in nats.

Its logits are by far the largest tensors of a training step: a row of 1,024 tokens has 103 MB of them in
bfloat16. Three ways to compute the same number treat them with care.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


def next_token_loss(
    lm_head: nn.Linear, hidden: torch.Tensor, targets: torch.Tensor, vocab_size: int, n_chunks: int = 1
) -> torch.Tensor:
    """The mean cross-entropy over all targets, a scalar.

    Args:
        lm_head: hidden states (..., n_embd) to logits; columns from `vocab_size` on only pad the vocabulary.
        hidden: (B, T, n_embd).
        targets: (B, T) int64 token ids; -100 is ignored.
        n_chunks: above 1, the logits exist for one of so many chunks at a time, which takes less memory.
    """
    hidden, targets = hidden.flatten(0, 1), targets.flatten()
    if n_chunks > 1:
        chunked = chunked_cross_entropy
        if torch.compiler.is_compiling():  # the compiler would keep the chunks' logits, all of them at once
            chunked = torch.compiler.disable(chunked_cross_entropy)
        return chunked(hidden, lm_head.weight, targets, vocab_size, n_chunks)
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


def chunked_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, vocab_size: int, n_chunks: int
) -> torch.Tensor:
    """The same from hidden states (N, n_embd) and the head's weight (columns, n_embd); the logits of one
    chunk exist at a time."""
    return ChunkedCrossEntropy.apply(hidden, weight, targets, vocab_size, n_chunks)


class ChunkedCrossEntropy(torch.autograd.Function):
    """Cross-entropy whose gradient is computed with it, chunk by chunk, in the forward pass.

    The gradient of the mean over N targets is (softmax - one-hot) / N, which needs nothing from later: so
    each chunk's logits turn into their gradient in place, and that into the gradients of hidden states and
    weight. Nothing is computed twice, and the backward pass only multiplies by the gradient that comes in.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        vocab_size: int,
        n_chunks: int,
    ) -> torch.Tensor:
        device = hidden.device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else hidden.dtype  # of the matrix products
        w = weight[:vocab_size].to(dtype)
        count = (targets != -100).sum()
        total = torch.zeros((), device=hidden.device)
        # float16 ends at 65,504: a frequent token's sum over a chunk must stay below
        shrink = 1 / 16 if dtype == torch.float16 else 1.0
        with torch.autocast(device, enabled=False):
            if any(ctx.needs_input_grad):
                grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight)
            for i, (h, t) in enumerate(zip(hidden.chunk(n_chunks), targets.chunk(n_chunks), strict=True)):
                h, valid, t = h.to(dtype), (t != -100)[:, None], t.clamp(min=0)[:, None]
                logits = (h @ w.t()).float()
                logits -= logits.logsumexp(dim=-1, keepdim=True)  # now log-probabilities
                total -= (logits.gather(-1, t) * valid).sum()
                if any(ctx.needs_input_grad):
                    gradient = logits.exp_()
                    gradient.scatter_add_(-1, t, torch.full_like(t, -1, dtype=gradient.dtype))
                    gradient = gradient.mul_(valid * shrink).to(dtype)
                    grad_hidden.chunk(n_chunks)[i].copy_(gradient @ w)
                    grad_weight[:vocab_size] += gradient.t() @ h
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(grad_hidden, grad_weight, count * shrink)
        return total / count

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_hidden, grad_weight, divisor = ctx.saved_tensors
        scale = grad_output / divisor
        return grad_hidden * scale, grad_weight * scale, None, None, None
