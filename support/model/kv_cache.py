"""The key/value cache of attention. Sampling and scoring use it; training does not."""

import torch
from torch.nn import functional as F


class KVCache:
    """One layer's keys and values for the tokens read so far, with room for `length` tokens.

    Sampling then reads each token once, and four endings share one reading of their context (`select`).
    """

    def __init__(self, length: int):
        self.length, self.n_read = length, 0
        self.keys = self.values = torch.empty(0)

    def positions(self, T: int, device: torch.device) -> torch.Tensor:
        """Those of the T tokens to be read next, (T,) int64. Raises ValueError if they don't fit."""
        end = self.n_read + T
        if end > self.length:
            raise ValueError(f"a cache for {self.length} tokens is given {end}")
        return torch.arange(self.n_read, end, device=device)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Add T tokens, whose queries, keys and values are (B, nh, T, hs) each; returns what they see in
        themselves and in what came before them, (B, nh, T, hs)."""
        T = q.size(2)
        k, v = self.append(k, v)
        if k.size(2) == T:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        # the T queries are the last of all positions; a single query may attend to all of them
        mask = torch.ones(T, k.size(2), dtype=torch.bool, device=q.device).tril(k.size(2) - T)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask if T > 1 else None)

    def append(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Add keys and values, (B, nh, T, hs) each; returns those of all tokens read."""
        if self.n_read == 0:
            shape = (*k.shape[:2], self.length, k.size(3))
            self.keys, self.values = k.new_empty(shape), v.new_empty(shape)
        start, self.n_read = self.n_read, self.n_read + k.size(2)
        self.keys[:, :, start : self.n_read] = k
        self.values[:, :, start : self.n_read] = v
        return self.keys[:, :, : self.n_read], self.values[:, :, : self.n_read]

    def select(self, rows: torch.Tensor, length: int) -> "KVCache":
        """A copy of the rows with these indices, which may repeat, with room for `length` tokens."""
        copy = KVCache(length)
        copy.append(*(t[rows, :, : self.n_read] for t in (self.keys, self.values)))
        return copy


class FixedKVCache(KVCache):
    """Goes on from `cache`, one token at a time, with the same shapes at every position: so a step can be
    compiled once and replayed as a CUDA graph.

    `position`, (1,) int64 on the device, says where the next token goes; all layers share it, and the caller
    advances it. Attention runs over all `length` places and masks those after it.
    """

    def __init__(self, cache: KVCache, length: int, position: torch.Tensor):
        super().__init__(length)
        room = (0, 0, 0, length - cache.n_read)  # zeros: empty memory may hold NaNs, which no mask hides
        self.keys = F.pad(cache.keys[:, :, : cache.n_read], room)
        self.values = F.pad(cache.values[:, :, : cache.n_read], room)
        self.position = position

    def positions(self, T: int, device: torch.device) -> torch.Tensor:
        return self.position

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        self.keys.index_copy_(2, self.position, k)
        self.values.index_copy_(2, self.position, v)
        mask = torch.arange(self.length, device=q.device).view(1, -1) <= self.position  # (1, length)
        return F.scaled_dot_product_attention(q, self.keys, self.values, attn_mask=mask)
