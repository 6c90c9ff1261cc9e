"""
The loss where memory is short, or where the compiler wants another form: the mean cross-entropy, in nats.

Its logits are by far the largest tensors of a training step: a row of 1,024 tokens has 103 MB of them in
bfloat16. Both functions compute the same number as F.cross_entropy, and treat the logits with care.
"""

from typing import Any

import torch

COLUMN_BLOCKS = 8  # column blocks of the head's gradient, computed one at a time


def float_rows(device: torch.device) -> int:
    """How many rows of a chunk's logits exist in float32 at a time: on a CPU what its cache holds (13 MB);
    elsewhere each piece costs some 17 launches, which take longer than the work of a few rows."""
    return 64 if device.type == "cpu" else 1024


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
    """The same, with the logits of one of `n_chunks` chunks of tokens in memory at a time.

    Args:
        hidden: hidden states, (N, n_embd).
        weight: the head's, (columns, n_embd); columns from `vocab_size` on only pad the vocabulary.
        targets: (N,) int64; -100 is ignored.
    """
    if not torch.is_grad_enabled():
        weight = weight.detach()  # it would ask for a gradient in an evaluation, too
    compute = ChunkedCrossEntropy.apply
    if torch.compiler.is_compiling():  # the compiler would keep the logits of all chunks
        compute = torch.compiler.disable(compute)
    return compute(hidden, weight, targets, vocab_size, n_chunks)


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
        w = weight.to(dtype)  # with its padding: a GPU multiplies slowly where 50,257 numbers are a row
        count = (targets != -100).sum()
        total = torch.zeros((), device=hidden.device)
        # float16 ends at 65,504: a frequent token's sum over a chunk must stay below
        shrink = 1 / 16 if dtype == torch.float16 else 1.0
        wanted = any(ctx.needs_input_grad)
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight) if wanted else None
        ctx.gradients = grad_hidden, grad_weight, count * shrink
        chunks = zip(*(tensor.chunk(n_chunks) for tensor in (hidden, targets, grad_hidden)), strict=True)
        with torch.autocast(device, enabled=False):
            for h, t, grad_h in chunks:
                h = h.to(dtype)
                total += chunk_loss(h, w, t, vocab_size, shrink, grad_h=grad_h, grad_w=grad_weight)
        return total / count

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad_hidden, grad_weight, divisor), ctx.gradients = ctx.gradients, None  # a backward pass runs once
        scale = grad_output / divisor
        return grad_hidden.mul_(scale), grad_weight.mul_(scale), None, None, None


def chunk_loss(
    h: torch.Tensor,
    w: torch.Tensor,
    targets: torch.Tensor,
    vocab_size: int,
    shrink: float,
    grad_h: torch.Tensor,
    grad_w: torch.Tensor | None,
) -> torch.Tensor:
    """The summed cross-entropy from hidden states (N, n_embd) and the head's weight (columns, n_embd). Puts
    its gradient, times `shrink`, into grad_h (N, n_embd) and adds it to grad_w (columns, n_embd)."""
    logits = h @ w.t()
    logits[:, vocab_size:].fill_(-torch.inf)  # the padding gets a probability of 0, and a gradient of 0
    n = float_rows(h.device)
    pieces = zip(logits.split(n), targets.split(n), strict=True)
    total = torch.stack([to_gradient(rows, t, shrink) for rows, t in pieces]).sum()
    if grad_w is not None:
        grad_h.copy_(logits @ w)
        blocks = grad_w.chunk(COLUMN_BLOCKS)
        for block, columns in zip(blocks, logits.chunk(COLUMN_BLOCKS, dim=1), strict=True):
            block += columns.t() @ h
    return total


def to_gradient(logits: torch.Tensor, targets: torch.Tensor, shrink: float) -> torch.Tensor:
    """Turn logits (N, columns) into the gradient of their summed cross-entropy, times `shrink`, in place;
    returns that sum, a scalar. Targets (N,) of -100 are ignored."""
    valid, targets = (targets != -100)[:, None], targets.clamp(min=0)[:, None]
    values = logits.float()  # the same memory if they are float32 already
    values -= values.amax(dim=-1, keepdim=True)
    of_target = values.gather(-1, targets)
    totals = values.exp_().sum(dim=-1, keepdim=True)
    values /= totals  # the softmax
    values.scatter_add_(-1, targets, torch.full_like(targets, -1, dtype=values.dtype))
    logits.copy_(values.mul_(valid * shrink))
    return ((totals.log() - of_target) * valid).sum()
