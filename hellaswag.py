"""
Score any GPT-2 on HellaSwag: which of four endings does the model find most likely?

    python hellaswag.py --model gpt2                             # OpenAI's 124M, items from the Hub
    python hellaswag.py --model log --data hellaswag_val.jsonl   # a run's newest checkpoint, a local file

The protocol is the tutorial's: the context's tokens, then " " + ending; the loss of the ending's tokens is
summed (acc) or averaged (acc_norm), and the ending with the lowest loss is the answer. OpenAI's 124M reaches
.2859 / .2955 on the 10,042 items of the validation split. The number that lm-evaluation-harness prints for
it, .3114, is another protocol: compare like with like.
"""

import json
import math
from collections.abc import Iterator, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tiktoken
import torch
import torch.distributed as dist
from torch.nn import functional as F
from tqdm import tqdm

from shards import InputError, get_encoding, hub_errors, run_command

DATASET = "Rowan/hellaswag"
N_VALIDATION = 10_042  # items of the validation split (HellaSwag paper, section 4)
ROWS_PER_BATCH = 32  # eight items
PROTOCOL = "tutorial protocol"


@dataclass(frozen=True)
class ScoreConfig:
    """Score a GPT-2 on HellaSwag's validation items."""

    model: str = "gpt2"  # a Hub name (gpt2, gpt2-medium, ...), a checkpoint folder, or a run's folder
    data: Path | None = None  # items as JSON lines; default: the validation split from the Hub
    limit: int | None = None  # score only the first items; default: all
    save_predictions: Path | None = None  # write a JSON line per item here
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of the matrix products
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"


@dataclass(frozen=True)
class Item:
    ind: int
    ctx: str
    endings: tuple[str, str, str, str]
    label: int  # index of the true ending


@dataclass(frozen=True)
class Score:
    """Accuracies over `n` items and, from one process alone, what was predicted for each."""

    n: int
    acc: float  # by summed loss
    acc_norm: float  # by mean loss per token
    truncated: int  # items that were longer than the block size and lost the beginning of their context
    predictions: list[dict[str, Any]]

    def standard_error(self, accuracy: float) -> float:
        """Of an accuracy over n items (the binomial's, with n - 1 as the harness has it)."""
        return math.sqrt(accuracy * (1 - accuracy) / max(1, self.n - 1))

    def __str__(self) -> str:
        cut = f", {self.truncated} contexts cut to fit" if self.truncated else ""
        return (
            f"acc {self.acc:.4f} +- {self.standard_error(self.acc):.4f}, "
            f"acc_norm {self.acc_norm:.4f} +- {self.standard_error(self.acc_norm):.4f} "
            f"({self.n:,} items, {PROTOCOL}{cut})"
        )


# -----------------------------------------------------------------------------
# items


def to_item(fields: Any, where: str) -> Item:
    """Check one item and make an Item of it; the Hub's labels are strings."""
    try:
        item = Item(int(fields["ind"]), fields["ctx"], tuple(fields["endings"]), int(fields["label"]))
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{where}: not a HellaSwag item with ind, ctx, endings and label") from error
    strings = (item.ctx, *item.endings)
    if len(item.endings) != 4 or not 0 <= item.label < 4 or not all(isinstance(s, str) for s in strings):
        raise InputError(f"{where}: an item has a context, four endings and a label from 0 to 3")
    return item


def load_items(file: Path | None = None, limit: int | None = None) -> list[Item]:
    """The items of a JSON-lines file, or the validation split from the Hub.

    Raises InputError, naming file and line, for what is not an item; or when the Hub can't be reached.
    """
    if file is None:
        with hub_errors(
            f"{DATASET} (a local copy works too: --data FILE.jsonl, or --hellaswag_data in training)"
        ):
            import datasets

            rows = datasets.load_dataset(DATASET, split="validation")
        check_complete(rows)
        return [to_item(row, f"{DATASET}, item {number}") for number, row in enumerate(rows)][:limit]
    items = []
    try:
        with open(file, encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if limit is not None and len(items) == limit:
                    break
                try:
                    fields = json.loads(line)
                except ValueError as error:
                    raise InputError(f"{file}, line {number}: not JSON") from error
                items.append(to_item(fields, f"{file}, line {number}"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"HellaSwag items {file}: {error}") from error
    if not items:
        raise InputError(f"HellaSwag items {file}: the file is empty")
    return items


def check_complete(rows: Sized) -> None:
    if len(rows) != N_VALIDATION:
        raise InputError(f"{DATASET} has {len(rows):,} validation items, expected {N_VALIDATION:,}")


def render(item: Item, encoding: tiktoken.Encoding) -> tuple[list[list[int]], list[list[int]]]:
    """The item as four rows of tokens, context and ending, and four masks with 1 where the ending is."""
    context = encoding.encode_ordinary(item.ctx)
    endings = [encoding.encode_ordinary(" " + ending) for ending in item.endings]
    rows = [context + ending for ending in endings]
    masks = [[0] * len(context) + [1] * len(ending) for ending in endings]
    return rows, masks


# -----------------------------------------------------------------------------
# scoring


@torch.no_grad()
def score_rows(
    model: Any, rows: list[list[int]], masks: list[list[int]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss of the masked tokens of each row, in nats: summed and averaged, (n_rows,) float32 each.

    Rows are filled up at the right, where causal attention never looks, so padding changes no score.
    """
    device = next(model.parameters()).device
    n_rows, width = len(rows), max(map(len, rows))
    tokens = np.zeros((n_rows, width), dtype=np.int64)
    mask = np.zeros((n_rows, width), dtype=bool)
    for i, (row, row_mask) in enumerate(zip(rows, masks, strict=True)):
        tokens[i, : len(row)], mask[i, : len(row)] = row, row_mask
    tokens, mask = torch.from_numpy(tokens).to(device), torch.from_numpy(mask).to(device)
    hidden = model.hidden_states(tokens[:, :-1])  # position t predicts token t + 1
    scored = mask[:, 1:]
    logits = model.head(hidden[scored])  # (n_scored, vocab_size): only where a score needs them
    losses = F.cross_entropy(logits.float(), tokens[:, 1:][scored], reduction="none")
    row_of = torch.arange(n_rows, device=device).unsqueeze(1).expand_as(scored)[scored]
    sums = torch.zeros(n_rows, device=device).index_add_(0, row_of, losses)
    return sums, sums / scored.sum(dim=1)


def evaluate(
    model: Any,
    items: list[Item],
    encoding: tiktoken.Encoding,
    rank: int = 0,
    world_size: int = 1,
    progress: bool = False,
) -> Score:
    """Score `model` (a GPT) on `items`, divided among the ranks; every rank gets the whole score.

    An item longer than the model's block size loses the beginning of its context, and is counted.
    """
    block_size = model.config.block_size
    own = [(item, *render(item, encoding)) for item in items[rank::world_size]]
    own.sort(key=lambda rendered: max(map(len, rendered[1])))  # like lengths together: little padding
    predictions, counts = [], np.zeros(4, dtype=np.int64)  # of: correct, correct by mean, cut, all
    for batch in tqdm(list(batches(own)), desc="HellaSwag", disable=not progress, dynamic_ncols=True):
        # keep block_size + 1 tokens: the last one is only predicted, never read
        rows = [row[-block_size - 1 :] for _, rows, _ in batch for row in rows]
        masks = [mask[-block_size - 1 :] for _, _, masks in batch for mask in masks]
        sums, means = (losses.view(-1, 4).tolist() for losses in score_rows(model, rows, masks))
        for (item, all_rows, _), loss_sum, loss_mean in zip(batch, sums, means, strict=True):
            pred, pred_norm = (min(range(4), key=losses.__getitem__) for losses in (loss_sum, loss_mean))
            counts += (
                pred == item.label,
                pred_norm == item.label,
                max(map(len, all_rows)) > block_size + 1,
                1,
            )
            predictions.append({"ind": item.ind, "label": item.label, "pred": pred, "pred_norm": pred_norm,
                                "loss_sum": loss_sum, "loss_mean": loss_mean})  # fmt: skip
    if world_size > 1:
        device = next(model.parameters()).device
        total = torch.from_numpy(counts).to(device if device.type == "cuda" else "cpu")
        dist.all_reduce(total)
        counts = total.cpu().numpy()
    correct, correct_norm, truncated, n = (int(count) for count in counts)
    order = {item.ind: i for i, item in enumerate(items)}
    predictions.sort(key=lambda prediction: order[prediction["ind"]])
    return Score(n, correct / n, correct_norm / n, truncated, predictions)


def batches(rendered: list[Any]) -> Iterator[list[Any]]:
    per_batch = ROWS_PER_BATCH // 4
    for i in range(0, len(rendered), per_batch):
        yield rendered[i : i + per_batch]


# -----------------------------------------------------------------------------


def main(config: ScoreConfig) -> None:
    from train_gpt2 import GPT, check_vocabulary, choose_device

    if config.limit is not None and config.limit < 1:
        raise InputError(f"--limit {config.limit}: must be at least 1")
    device = choose_device(config.device)
    items = load_items(config.data, config.limit)
    model = GPT.from_pretrained(config.model).to(device)
    encoding = get_encoding(model.config.encoding)
    check_vocabulary(model.config, encoding)
    if config.save_predictions:
        config.save_predictions.touch()  # fails now, not after the last item
    dtype = getattr(torch, config.dtype)
    with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
        score = evaluate(model, items, encoding, progress=True)
    print(f"{config.model}: HellaSwag {score}")
    if config.save_predictions:
        with open(config.save_predictions, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(prediction) + "\n" for prediction in score.predictions)


if __name__ == "__main__":
    run_command(main, ScoreConfig)
