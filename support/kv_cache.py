"""The key/value cache of attention. Sampling and scoring use it; training does not."""

import torch


class KVCache:
    """One layer's keys and values for the tokens read so far, with room for `length` tokens.

    Sampling then reads each token once, and four endings share one reading of their context (`select`).
    """

    def __init__(self, length: int):
        self.length, self.n_read = length, 0
        self.keys = self.values = torch.empty(0)

    def append(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Add the keys and values of T more tokens, (B, nh, T, hs) each; returns those of all tokens read.

        Raises ValueError if they don't fit.
        """
        if self.n_read == 0:
            shape = (*k.shape[:2], self.length, k.size(3))
            self.keys, self.values = k.new_empty(shape), v.new_empty(shape)
        start, self.n_read = self.n_read, self.n_read + k.size(2)
        if self.n_read > self.length:
            raise ValueError(f"a cache for {self.length} tokens is given {self.n_read}")
        self.keys[:, :, start : self.n_read] = k
        self.values[:, :, start : self.n_read] = v
        return self.keys[:, :, : self.n_read], self.values[:, :, : self.n_read]

    def select(self, rows: torch.Tensor, length: int) -> "KVCache":
        """A copy of the rows with these indices, which may repeat, with room for `length` tokens."""
        copy = KVCache(length)
        copy.append(*(t[rows, :, : self.n_read] for t in (self.keys, self.values)))
        return copy
