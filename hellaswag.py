"""
Score any GPT-2 on HellaSwag: which of four endings does the model find most likely?

    python hellaswag.py --model gpt2                             # OpenAI's 124M, items from the Hub
    python hellaswag.py --model log --data hellaswag_val.jsonl   # a run's newest checkpoint, a local file
    python hellaswag.py --model gpt2 gpt2-medium log             # a table of several

The two protocols give different numbers; compare like with like. On the 10,042 validation items, OpenAI's
124M scores (acc / acc_norm)

    tutorial   .2859 / .2955   The context's tokens, then " " + ending. An ending's loss is summed (acc) or
                               averaged over its tokens (acc_norm); the lowest wins.
    harness    .2892 / .3114   lm-evaluation-harness: the activity first, ctx_b capitalised, brackets removed.
                               The loss is summed (acc) or divided by the ending's characters (acc_norm).

Each context is read once, into a key/value cache that its four endings share.
"""

import json
import math
import re
import sys
import time
from collections.abc import Callable, Iterator, Sized
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from support.cli import CommandError, InputError, PositiveInt, RunFault, check_numbers, in_words, run_command
from support.data.documents import read_rows
from support.data.encodings import get_encoding
from support.data.hub import hub_or_disk
from support.machine.device import (
    DeviceName,
    autocast_to,
    choose_device,
    is_out_of_memory,
    to_device,
    varying_shapes,
)
from support.machine.processes import World, faults_in_one_line
from support.machine.sharding import gathered
from support.model.huggingface import find_model
from support.model.sampling import NOT_FINITE, KVCache

import numpy as np
import tiktoken
import torch
from torch.nn import functional as F
from tqdm import tqdm

if TYPE_CHECKING:
    from train_gpt2 import GPT, TrainConfig

DATASET = "Rowan/hellaswag"
N_VALIDATION = 10_042  # items of the validation split (HellaSwag paper, section 4)
Protocol = Literal["tutorial", "harness"]


@dataclass(frozen=True)
class ScoreConfig:
    """Score GPT-2s on HellaSwag's validation items."""

    model: tuple[str, ...] = ("gpt2",)
    """Hub names (gpt2, gpt2-medium, ...), checkpoint or run folders, or files such as ckpt.pt"""
    protocol: Protocol = "tutorial"  # how prompts are built and endings scored; see the top of hellaswag.py
    data: Path | None = None  # items as JSON lines or .parquet; default: the validation split from the Hub
    limit: PositiveInt | None = None  # score only this many items, spread evenly; default: all
    save_predictions: Path | None = None  # write a JSON line per item here
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of the matrix products
    device: DeviceName = "auto"


@dataclass(frozen=True)
class Item:
    ind: int
    ctx: str
    endings: tuple[str, str, str, str]
    label: int  # index of the true ending
    harness_ctx: str | None = None  # the context as the harness builds it; None if fields are missing


@dataclass(frozen=True)
class Rendered:
    """A tokenized item."""

    item: Item
    context: list[int]
    endings: list[list[int]]  # four
    lengths: list[float]  # acc_norm divides each ending's loss by this: its tokens or characters
    truncated: bool = False
    starts: tuple[int, ...] = (0, 0, 0, 0)  # the context of each ending begins at this token of `context`


@dataclass(frozen=True)
class Score:
    """Accuracies over `n` items; `predictions` covers only this process's items."""

    n: int
    acc: float  # by summed loss
    acc_norm: float  # by loss over length
    truncated: int  # items that `fit` cut to the block size
    predictions: list[dict[str, Any]]
    protocol: Protocol = "tutorial"

    def standard_error(self, accuracy: float) -> float:
        """The binomial standard error of an accuracy over n items, with n - 1 as in the harness."""
        return math.sqrt(accuracy * (1 - accuracy) / max(1, self.n - 1))

    def __str__(self) -> str:
        cut = f", {self.truncated} cut to fit" if self.truncated else ""
        return (
            f"acc {self.acc:.4f} +- {self.standard_error(self.acc):.4f}, "
            f"acc_norm {self.acc_norm:.4f} +- {self.standard_error(self.acc_norm):.4f} "
            f"({self.n:,} items, {self.protocol} protocol{cut})"
        )


@dataclass(frozen=True)
class Limits:
    """How much is computed at once. On a CPU small batches lose little, and padding costs time; on a GPU
    every pass of the model is hundreds of launches, which fewer, larger batches save."""

    tokens: int  # in the rows of a batch: 74 kB of keys and values each for the 124M model in float32
    rows: int  # in a pass
    spread: int  # tokens by which contexts of a batch may differ; what exceeds the shortest is read 4 times
    logits: int  # tokens whose float32 logits exist at once: 201 kB each


LIMITS = {
    "cpu": Limits(8_192, 32, 2, 128),
    "gpu": Limits(65_536, 512, 16, 4_096),
    "mps": Limits(16_384, 128, 16, 1_024),  # a quarter: a Mac's memory is everybody's
}


def limits_for(model: "GPT", kind: str | None = None) -> Limits:
    """The limits of `kind`, by default the model's device. A model larger than 124M gets fewer tokens, for
    the same memory."""
    kind = kind or next(model.parameters()).device.type
    limits, config = LIMITS.get(kind, LIMITS["gpu"]), model.config
    tokens = limits.tokens * 12 * 768 // max(12 * 768, config.n_layer * config.n_embd)
    return replace(limits, tokens=tokens)


# -----------------------------------------------------------------------------
# items


def to_item(fields: Any, where: str) -> Item:
    """Check one item's fields and return an Item; the Hub's labels are strings."""
    try:
        label = fields["label"]
        if (
            not isinstance(fields["endings"], list)
            or not isinstance(label, int | str)
            or isinstance(label, bool)
        ):
            raise TypeError
        item = Item(
            int(fields["ind"]), fields["ctx"], tuple(fields["endings"]), int(label), harness_context(fields)
        )
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise InputError(f"{where}: not a HellaSwag item with ind, ctx, endings and label") from error
    strings = (item.ctx, *item.endings)
    if len(item.endings) != 4 or not 0 <= item.label < 4 or not all(isinstance(s, str) for s in strings):
        raise InputError(f"{where}: an item has a context, four endings and a label from 0 to 3")
    return item


def harness_context(fields: dict[str, Any]) -> str | None:
    """The context as the harness builds it; None if one of its fields is missing."""
    activity, ctx_a, ctx_b = (fields.get(name) for name in ("activity_label", "ctx_a", "ctx_b"))
    if not (isinstance(activity, str) and isinstance(ctx_a, str) and isinstance(ctx_b, str)):
        return None
    return clean(f"{activity}: {ctx_a} {ctx_b.capitalize()}")


def clean(text: str) -> str:
    """Clean a text as lm-evaluation-harness does (`preprocess` of its task hellaswag): WikiHow's [title] ends
    a sentence; other brackets are removed."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def load_items(file: Path | None = None, limit: int | None = None, flag: str = "--data") -> list[Item]:
    """Load a file of JSON lines or a .parquet file (named by `flag`), or the validation split from the Hub.
    `limit` picks that many items, spread evenly: the split has all ActivityNet items before WikiHow's.

    Raises InputError, naming file and line, for anything that is not an item, or CommandError if the Hub
    fails.
    """
    if file is None:
        print(f"looking for {DATASET} on the Hugging Face Hub", file=sys.stderr)
        import datasets

        rows = hub_or_disk(
            f"{DATASET} (a local copy works too: {flag} FILE.jsonl)",
            lambda: datasets.load_dataset(DATASET, split="validation"),
        )
        check_complete(rows)
        return spread([to_item(row, f"{DATASET}, item {n}") for n, row in enumerate(rows)], limit)
    try:
        items = [to_item(fields, place) for place, fields in read_rows(file)]
    except OSError as error:
        raise InputError(f"{flag} {in_words(error)}") from error
    if not items:
        raise InputError(f"{flag} {file}: the file is empty")
    return spread(items, limit)


def items_for_training(config: "TrainConfig") -> list[Item]:
    """The items to score during training; none if --hellaswag_every is 0. If the Hub can't provide them,
    print a note and return none; a local --hellaswag_data must load."""
    if not config.hellaswag_every:
        return []
    try:
        return load_items(config.hellaswag_data, config.hellaswag_limit, "--hellaswag_data")
    except CommandError as error:
        if config.hellaswag_data is not None:
            raise
        print(f"training without HellaSwag: {error}")
        return []


def spread(items: list[Item], limit: int | None) -> list[Item]:
    n = min(limit or len(items), len(items))
    return [items[i * len(items) // n] for i in range(n)]


def check_complete(rows: Sized) -> None:
    if len(rows) != N_VALIDATION:
        raise InputError(f"{DATASET} has {len(rows):,} validation items, expected {N_VALIDATION:,}")


def render(item: Item, encoding: tiktoken.Encoding, protocol: Protocol = "tutorial") -> Rendered:
    """Tokenize an item. Raises InputError if it lacks the fields that the harness protocol needs."""
    if protocol == "tutorial":
        context = encoding.encode_ordinary(item.ctx)
        endings = [encoding.encode_ordinary(" " + ending) for ending in item.endings]
        return Rendered(item, context or [encoding.eot_token], endings, [len(ending) for ending in endings])
    if item.harness_ctx is None:
        raise InputError(
            f"item {item.ind} has no activity_label, ctx_a and ctx_b, which the harness protocol needs; use "
            "--protocol tutorial, or the official items"
        )
    texts = [clean(ending) for ending in item.endings]
    # trailing white space of the context belongs to the ending, as in the harness
    query = item.harness_ctx.rstrip()
    context = encoding.encode_ordinary(query)
    endings = [encoding.encode_ordinary(f"{item.harness_ctx} {text}")[len(context) :] for text in texts]
    return Rendered(item, context or [encoding.eot_token], endings, [max(1, len(text)) for text in texts])


def fit(rendered: Rendered, block_size: int, protocol: Protocol = "tutorial") -> Rendered:
    """Cut the beginning of the context so that the longest ending fits after it; an ending's last token is
    predicted, never read. The harness cuts it for each ending on its own (`_loglikelihood_tokens` of its
    HFLM). An ending that leaves no room for a context loses its own end; the harness refuses it."""
    endings = [ending[:block_size] for ending in rendered.endings]
    rooms = [block_size + 1 - len(ending) for ending in endings]  # tokens of context before each ending
    if protocol == "tutorial":
        rooms = [min(rooms)] * len(rooms)
    context = rendered.context[-max(rooms) :]
    starts = tuple(max(0, len(context) - room) for room in rooms)
    truncated = len(rendered.context) > min(rooms) or endings != rendered.endings
    lengths = [
        length * len(cut) / len(whole)
        for length, cut, whole in zip(rendered.lengths, endings, rendered.endings, strict=True)
    ]
    return replace(
        rendered, context=context, endings=endings, lengths=lengths, truncated=truncated, starts=starts
    )


# -----------------------------------------------------------------------------
# scoring


def batches(rendered: list[Rendered], limits: Limits) -> Iterator[list[Rendered]]:
    """Group items of similar length; those whose endings share no context come last, by themselves."""
    batch: list[Rendered] = []
    for one in sorted(rendered, key=lambda r: (any(r.starts), len(r.context), max(map(len, r.endings)))):
        length = len(one.context) + max(len(ending) for other in (*batch, one) for ending in other.endings)
        too_many = 4 * (len(batch) + 1) * length > limits.tokens
        first = batch[0] if batch else one
        longer = len(one.context) > len(first.context) + limits.spread
        if batch and (too_many or longer or any(one.starts) != any(first.starts)):
            yield batch
            batch = []
        batch.append(one)
    if batch:
        yield batch


def score_within_memory(model: "GPT", batch: list[Rendered], limits: Limits) -> tuple[torch.Tensor, Limits]:
    """`score_batch`, in a CPU's small batches if memory is too short for a GPU's large ones; and the limits
    for the next batch, which stay small: every failure makes the device wait and empties its cache."""
    small = limits_for(model, "cpu")
    if limits != small:
        try:
            return score_batch(model, batch, limits), limits
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
    return torch.cat([score_batch(model, part, small) for part in batches(batch, small)]), small


@torch.no_grad()
def score_batch(model: "GPT", batch: list[Rendered], limits: Limits) -> torch.Tensor:
    """The summed loss of every ending, in nats: (n_items, 4) float32. Never waits for the device.

    The first n_read tokens of each context are read once; the shortest context has one more. Each row
    continues with the rest of a context and one ending; rows of similar length are read together. Where
    endings don't share a context, nothing is read beforehand.
    """
    device = next(model.parameters()).device
    shared = not any(any(one.starts) for one in batch)
    # the last token of a context predicts, so it goes into the rows
    n_read = min(len(one.context) for one in batch) - 1 if shared else 0
    caches = None
    if n_read > 0:
        caches = model.new_caches(n_read)
        (contexts,) = to_device(device, np.array([one.context[:n_read] for one in batch]))
        model.hidden_states(contexts, caches)
    rests = [one.context[n_read + start :] for one in batch for start in one.starts]
    endings = [ending for one in batch for ending in one.endings]
    rows = [rest + ending for rest, ending in zip(rests, endings, strict=True)]
    starts = [len(rest) for rest in rests]  # of the ending in each row
    sums = torch.zeros(len(rows), device=device)
    by_length = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    for first in range(0, len(rows), limits.rows):
        some = by_length[first : first + limits.rows]
        some_rows, some_starts = [rows[i] for i in some], [starts[i] for i in some]
        here, item = to_device(device, np.array(some), np.array(some) // 4)
        length = n_read + len(some_rows[-1]) - 1
        going_on = [cache.select(item, length) for cache in caches] if caches else None
        sums[here] = score_rows(model, some_rows, some_starts, going_on, limits.logits)
    return sums.view(-1, 4)


def score_rows(
    model: "GPT", rows: list[list[int]], starts: list[int], caches: list[KVCache] | None, logits_at_once: int
) -> torch.Tensor:
    """The summed loss of each row from its start on, (n_rows,) float32, given the tokens in `caches`.

    Rows are padded on the right, where causal attention never looks, so padding changes no score. Logits are
    computed only for scored tokens.
    """
    device = next(model.parameters()).device
    padded = np.zeros((len(rows), max(map(len, rows))), dtype=np.int64)
    scored = np.zeros(padded.shape, dtype=bool)
    for i, (tokens, start) in enumerate(zip(rows, starts, strict=True)):
        padded[i, : len(tokens)], scored[i, start : len(tokens)] = tokens, True
    idx, row, position = to_device(device, padded, *np.nonzero(scored))
    hidden = model.hidden_states(idx[:, :-1], caches)[row, position - 1]  # (n_scored, C)
    targets = idx[row, position]
    sums = torch.zeros(len(rows), device=device)
    for first in range(0, len(targets), logits_at_once):
        part = slice(first, first + logits_at_once)
        losses = F.cross_entropy(model.head(hidden[part]).float(), targets[part], reduction="none")
        sums.index_add_(0, row[part], losses)
    return sums


def evaluate(
    model: "GPT",
    items: list[Item],
    encoding: tiktoken.Encoding,
    world: World | None = None,
    *,
    progress: bool = False,
    protocol: Protocol = "tutorial",
    on_part: Callable[[int, int], None] = lambda done, total: None,
) -> Score:
    """Score `model` on `items`, split among the processes of `world`; each returns the accuracies over all
    items. `progress` shows a bar; `on_part` is called with the items done and the items in all,
    before each batch and at the end.

    An item longer than the block size loses the beginning of its context (see `fit`) and is counted as
    truncated.
    """
    device = next(model.parameters()).device
    world = world or World(0, 1, device)
    own_items, limits = items[world.rank :: world.size], limits_for(model)
    own = [fit(render(item, encoding, protocol), model.config.block_size, protocol) for item in own_items]
    order: list[Rendered] = []
    sums = torch.zeros(len(own), 4, device=device)  # a small tensor per batch would fragment the memory
    right, n_counted, shown_at = 0, 0, time.monotonic()
    bar = tqdm(total=len(own), desc="HellaSwag", disable=not progress, dynamic_ncols=True)
    with gathered(model), varying_shapes(), bar:
        for batch in batches(own, limits):
            on_part(len(order), len(own))
            losses_of_batch, limits = score_within_memory(model, batch, limits)
            sums[len(order) : len(order) + len(batch)] = losses_of_batch
            order += batch
            bar.update(len(batch))
            if progress and time.monotonic() - shown_at > 1:  # reading the losses waits for the device
                for one, losses in zip(order[n_counted:], sums[n_counted : len(order)].tolist(), strict=True):
                    means = [loss / length for loss, length in zip(losses, one.lengths, strict=True)]
                    right += means.index(min(means)) == one.item.label
                n_counted, shown_at = len(order), time.monotonic()
                bar.set_postfix_str(f"acc_norm {right / n_counted:.4f}")
    on_part(len(own), len(own))
    loss_sums = sums.tolist()  # waits for the device
    place = {id(item): i for i, item in enumerate(items)}
    scored = sorted(zip(order, loss_sums, strict=True), key=lambda pair: place[id(pair[0].item)])
    predictions = []
    for one, loss_sum in scored:
        loss_mean = [loss / length for loss, length in zip(loss_sum, one.lengths, strict=True)]
        pred, pred_norm = loss_sum.index(min(loss_sum)), loss_mean.index(min(loss_mean))
        prediction = {
            "ind": one.item.ind,
            "label": one.item.label,
            "pred": pred,
            "pred_norm": pred_norm,
            "loss_sum": loss_sum,
            "loss_mean": loss_mean,
        }
        predictions.append(prediction)
    counted = [sum(p[key] == p["label"] for p in predictions) for key in ("pred", "pred_norm")]
    bad = sum(not all(map(math.isfinite, losses)) for losses in loss_sums)
    counts = torch.tensor([*counted, sum(one.truncated for one in own), len(own), bad])
    correct, correct_norm, truncated, n, bad = world.sum(counts).tolist()
    if bad:
        raise RunFault(f"HellaSwag: the losses of {bad:,} of {n:,} items are not finite; {NOT_FINITE}")
    return Score(n, correct / n, correct_norm / n, truncated, predictions, protocol=protocol)


# -----------------------------------------------------------------------------


@faults_in_one_line()
def main(config: ScoreConfig) -> None:
    from train_gpt2 import GPT

    check_numbers(config)
    if not config.model:
        raise InputError("--model: name one or more")
    if config.save_predictions and len(config.model) > 1:
        raise InputError("--save_predictions: for one --model at a time")
    device = choose_device(config.device)
    items = load_items(config.data, config.limit)
    if config.save_predictions:
        if config.data and config.save_predictions.resolve() == config.data.resolve():
            raise InputError(f"--save_predictions {config.data}: that file holds the items; choose another")
        open(config.save_predictions, "ab").close()  # fails now, not after the last item
    dtype = getattr(torch, config.dtype)
    for name in config.model:
        find_model(name)  # fail before scoring the first if one is missing
    width = max(map(len, config.model))
    for name in config.model:
        model = GPT.from_pretrained(name).to(device).eval()
        encoding = get_encoding(model.config.encoding, model.config.vocab_size)
        with autocast_to(device, dtype):
            score = evaluate(model, items, encoding, progress=True, protocol=config.protocol)
        print(f"{name:{width}}  HellaSwag {score}", flush=True)
        del model  # before the next one is read
    if config.save_predictions:
        with open(config.save_predictions, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(prediction) + "\n" for prediction in score.predictions)


if __name__ == "__main__":
    run_command(main, ScoreConfig, usual_flag="--model")
