"""
Sampling: draw the next token from the model's probabilities, again and again.

The keys and values of what was read are kept in a cache, which scoring uses too; training does not.
"""

import contextlib
import math
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from support.cli import brief
from support.machine.device import choose_compile, varying_shapes
from support.machine.sharding import gathered

import tiktoken
import torch
from torch import nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from train_gpt2 import GPT

COMPILE_FROM = 32  # tokens; for fewer, compilation is not tried
PROMPT = "Hello, I'm a language model,"  # the lecture's
NOT_FINITE = "try --dtype float32; if that does not help, the weights are to blame"  # advice


# -----------------------------------------------------------------------------
# the cache


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
        shape = (*cache.keys.shape[:2], length, cache.keys.size(3))
        self.keys, self.values = cache.keys.new_empty(shape), cache.values.new_empty(shape)
        self.position = position
        self.begin(cache)

    def begin(self, cache: KVCache) -> None:
        """Go on from `cache`, in the same memory. The rest becomes zeros: it may hold NaNs, which no mask
        hides."""
        for own, given in ((self.keys, cache.keys), (self.values, cache.values)):
            own[:, :, : cache.n_read] = given[:, :, : cache.n_read]
            own[:, :, cache.n_read :].zero_()

    def positions(self, T: int, device: torch.device) -> torch.Tensor:
        return self.position

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        self.keys.index_copy_(2, self.position, k)
        self.values.index_copy_(2, self.position, v)
        mask = torch.arange(self.length, device=q.device).view(1, -1) <= self.position  # (1, length)
        return F.scaled_dot_product_attention(q, self.keys, self.values, attn_mask=mask)


# -----------------------------------------------------------------------------
# sampling


@torch.no_grad()
def stream(
    model: "GPT",
    idx: torch.Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = 50,
    top_p: float = 1.0,
    seed: int | None = None,
    compile: bool = False,
) -> Iterator[torch.Tensor]:
    """Continue each row of `idx`, one token at a time, without ever waiting for the device.

    Args:
        idx: (B, T) int64, T at least 1.
        temperature, top_k, top_p: see `choose_token`.
        seed: same seed, same text; None draws from PyTorch's global generator.
        compile: on a GPU, compile the step for one token and replay it as a CUDA graph. Compilation takes a
            while, and serves all later texts of this process with as many rows and a similar length.

    Yields:
        (B, 1) int64: the next token of each row, max_new_tokens times; -1 where the largest logit is not
        finite. A text longer than block_size is continued from its last block_size tokens. Every new token
        then shifts all positions, so nothing can be cached, and each token costs a forward pass over the
        whole window.
    """
    generator = None if seed is None else torch.Generator(device=idx.device).manual_seed(seed)
    block_size = model.config.block_size
    tokens = unread = idx[:, -block_size:]
    length = min(tokens.size(1) + max_new_tokens, block_size)
    enough = length - tokens.size(1) >= COMPILE_FROM
    compiled, why = choose_compile(compile and enough, idx.device)
    if compile and enough and not compiled and idx.device.type == "cuda":
        print(f"note: sampling goes on without torch.compile ({why})", file=sys.stderr)
    caches, step = model.new_caches(length), None
    with contextlib.ExitStack() as at_the_end:
        for n in range(max_new_tokens):
            if compiled and n == 1:  # the prompt has been read
                fixed_length = min(math.ceil(length / 128) * 128, block_size)
                step = at_the_end.enter_context(compiled_step(model, caches, fixed_length))
            with varying_shapes():
                if tokens.size(1) > block_size:
                    logits = next_logits(model, tokens[:, -block_size:])
                else:
                    logits = step(model, unread) if step else next_logits(model, unread, caches)
            unread = choose_token(logits, temperature, top_k, top_p, generator)
            tokens = torch.cat((tokens, unread), dim=1)
            finite = logits.amax(dim=-1, keepdim=True).isfinite()
            yield unread.masked_fill(~finite, -1)  # so whoever reads the tokens knows, without another wait


def next_logits(model: "GPT", idx: torch.Tensor, caches: list[KVCache] | None = None) -> torch.Tensor:
    """The logits of the token after `idx`: (B, T) int64 to (B, vocab_size) float32."""
    return model.head(model.hidden_states(idx, caches)[:, -1]).float()


class CompiledStep:
    """`next_logits` for one token of each row, going on from `caches` up to `length` tokens: compiled once,
    then replayed as a CUDA graph. If compilation fails, it goes on without.

    A replay overwrites the logits of the one before.
    """

    def __init__(self, caches: list[KVCache], length: int):
        # filled by the device, because it would have to wait for a copy
        self.position = torch.full((1,), caches[0].n_read, device=caches[0].keys.device)
        self.fixed = [FixedKVCache(cache, length, self.position) for cache in caches]
        self.caches: list[KVCache] = [*self.fixed]  # as the model takes them
        for cache in self.fixed:
            for tensor in (cache.keys, cache.values):  # a graph writes only to addresses that it knows
                torch._dynamo.mark_static_address(tensor, guard=False)
        self.read = torch.compile(next_logits, mode="reduce-overhead", fullgraph=True, dynamic=False)

    def begin(self, caches: list[KVCache]) -> None:
        """Go on from the `caches` of another text."""
        self.position.fill_(caches[0].n_read)
        for own, given in zip(self.fixed, caches, strict=True):
            own.begin(given)

    def __call__(self, model: "GPT", token: torch.Tensor) -> torch.Tensor:
        """(B, 1) int64 to (B, vocab_size) float32."""
        try:
            logits = self.read(model, token, self.caches)
        except Exception as error:  # any compiler error; uncompiled, a real fault recurs
            print(f"torch.compile failed, sampling goes on without it ({brief(error)})", file=sys.stderr)
            torch.compiler.set_stance("force_eager")
            logits = self.read(model, token, self.caches)
        self.position += 1
        return logits


def convert_matrices(model: nn.Module, dtype: torch.dtype) -> None:
    """Convert the linear layers' weights and biases, once, to what autocast would convert them to: the logits
    under autocast stay the same to the bit. A CUDA graph would convert all of them for every token.

    All else stays float32. The head, tied to the embedding, gets a matrix of its own, so a model treated so
    is no longer to be trained or saved.
    """
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            for name, parameter in layer.named_parameters(recurse=False):
                setattr(layer, name, nn.Parameter(parameter.detach().to(dtype), requires_grad=False))


# Each model's compiled steps that no text uses at present, by shape and dtype. A CUDA graph is recorded for
# the addresses of its caches: with new caches for every text, every text would add a graph.
IDLE_STEPS: "WeakKeyDictionary[GPT, dict[Any, CompiledStep]]" = WeakKeyDictionary()


@contextlib.contextmanager
def compiled_step(model: "GPT", caches: list[KVCache], length: int) -> Iterator[CompiledStep]:
    """A CompiledStep that goes on from `caches`: an idle one, or a new one. After the block it is idle."""
    idle = IDLE_STEPS.setdefault(model, {})
    keys = caches[0].keys
    kind = (length, keys.size(0), keys.dtype, keys.device)
    step = idle.pop(kind, None)
    if step is None:
        step = CompiledStep(caches, length)
    else:
        step.begin(caches)
    try:
        yield step
    finally:
        if len(idle) < torch._dynamo.config.recompile_limit:  # more kinds are not compiled
            idle[kind] = step


def choose_token(
    logits: torch.Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Draw the next token of each row: (B, vocab_size) float32 to (B, 1) int64.

    Args:
        temperature: divides the logits; 0 takes the most likely token.
        top_k: draw from the k most likely tokens; None: from all.
        top_p: draw from the smallest set of tokens with this total probability (nucleus sampling: Holtzman et
            al., "The Curious Case of Neural Text Degeneration", section 3.1); 1: from all.
    """
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / temperature  # at most 0: no overflow
    tokens = None
    if top_k is not None or top_p < 1:
        logits, tokens = logits.topk(min(top_k or logits.size(-1), logits.size(-1)))  # most likely first
    probabilities = F.softmax(logits, dim=-1)
    if top_p < 1:
        likelier = probabilities.cumsum(dim=-1) - probabilities  # total probability of likelier tokens
        probabilities = probabilities.masked_fill(likelier >= top_p, 0)
    # A race: noise_i / p_i is the time of an event of rate p_i, and event i comes first with probability p_i.
    # torch.multinomial does the same, but checks its input, for which it waits for a GPU.
    noise = torch.empty_like(probabilities).exponential_(generator=generator)  # never 0
    choice = (probabilities / noise).argmax(dim=-1, keepdim=True)
    return choice if tokens is None else tokens.gather(-1, choice)


def write_samples(
    model: "GPT",
    encoding: tiktoken.Encoding,
    autocast: torch.autocast,
    on_part: Callable[[int, int], None] = lambda done, total: None,
) -> list[str]:
    """Continuations of PROMPT, the same draws every time. `on_part(done, total)` runs after each token."""
    # A model of bytes writes one longer text: a GPT-2 token is about four bytes of English.
    count, max_new_tokens = (1, 256) if encoding.name == "bytes" else (4, 32)
    prompt = encoding.encode_ordinary(PROMPT)[-model.config.block_size :]
    idx = torch.tensor([prompt] * count, device=next(model.parameters()).device)
    with gathered(model), autocast:
        for done, token in enumerate(stream(model, idx, max_new_tokens, seed=42), start=1):
            on_part(done, max_new_tokens)
            idx = torch.cat((idx, token), dim=1)
    rows = idx.tolist()
    none = "(no text: the logits are not finite)"  # no reason to end a run
    return [none if -1 in row else encoding.decode(row) for row in rows]
