"""
A checkpoint's model card: the README.md that the Hugging Face Hub shows as the model's page.

The card says only what is known. A license is the choice of whoever publishes the weights, so none is
claimed; a language is named only for datasets whose language is known. Its text is card.md, whose fields
are those of run.json and those computed here.
"""

import re
from pathlib import Path
from typing import Any

from support import VERSION
from support.cli import duration, plural, printable
from support.model.huggingface import how_to_use, limits, metadata, model_name
from support.run import curves

PICTURE = "loss.png"  # lies beside the card; people read both, no program here does
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
TABLE_ROWS = 10  # The table shows at most so many evaluations.
# Language and license of datasets, from their cards on the Hub.
KNOWN_DATASETS = {
    "HuggingFaceFW/fineweb-edu": ("en", "ODC-By 1.0"),
    "HuggingFaceFW/fineweb": ("en", "ODC-By 1.0"),
}


def run_card(
    facts: dict[str, Any],
    step: int,
    spent: dict[str, Any],
    events: dict[str, curves.Points],
    samples: tuple[int, list[str]] | None,
    picture: bool,
) -> str:
    """The card of a run's checkpoint.

    Args:
        facts: what run.json records.
        step: the checkpoint's.
        spent: seconds of "training" and of everything "other".
        events: the run's log up to `step`.
        samples: the step of the latest samples, and their texts.
        picture: whether loss.png lies beside the card.
    """
    config, changed = facts["train_config"], facts["changed"]
    block_size = facts["model_config"]["block_size"]
    dataset, commit = facts["data"]["dataset"], facts["versions"]["commit"]
    tokens = step * config["total_batch_size"]
    epochs, mixed = curves.epochs(facts, tokens), is_mix(facts)
    base, origin = None, "from scratch"
    if (start := config["init_from"]) is not None:  # a folder's name means nothing elsewhere
        name = start if "/" in start else f"openai-community/{start}"
        base = name if is_on_hub(name) and not Path(start).exists() else None
        origin = f"from the weights of {hub_link(base)}" if base else "from the weights of an earlier run"
    source = hub_link(dataset, "datasets/") if is_on_hub(dataset) else dataset
    language, data_license = KNOWN_DATASETS.get(dataset, (None, None))
    name = ("Changed " if changed else "") + model_name(facts["parameters"])
    known = {
        "model_name": name,
        "base_model": base,
        "datasets": [dataset] if is_on_hub(dataset) else None,
        "language": language,
        "eval_results": measured_at(step, facts, events),
    }
    momentum = config["momentum"]
    optimizers = {
        "Muon": f"Muon for the blocks' matrices, momentum {0.95 if momentum is None else momentum:g}; AdamW "
        f"for the rest, at {config['adamw_lr_ratio']:g} times the rate",
        "AdamW": f"AdamW, beta1 {0.9 if momentum is None else momentum:g}",
    }
    computed = {
        "metadata": metadata(loadable=not changed, **known),
        "name": name,
        "kind": "model" if changed else "GPT-2",
        "origin": origin,
        "dataset": source or facts["data"].get("text") or "text whose source its shards do not record",
        "tokens": tokens,
        "steps": plural(step, "step"),
        "change": f" It is not a GPT-2: {changed}." if changed else "",
        "rest": f" Training was to go on until step {config['max_steps']:,}." * (step < config["max_steps"]),
        "results": results_section(step, facts, events, picture),
        "read": f"{'at most ' if mixed else ''}{epochs:.2f} times",
        "optimizer": optimizers.get(facts["optimizer"], facts["optimizer"]),
        "schedule": curves.plan_of(config),
        "order": "" if config["shuffle"] else " in file order",
        "clipping": f"gradients clipped at {config['grad_clip']:g}" if config["grad_clip"] else "no clipping",
        "processes": plural(facts["world_size"], "process"),
        "precision": facts["precision"].partition(": it failed")[0],  # the compiler's words may have paths
        "part": " (of the part after the last interruption)" if facts["interruptions"] else "",
        "version": VERSION,
        "commit": f", commit `{commit[:12]}`{commit[40:]}" if commit else "",
        "training": duration(spent["training"]),
        "other": duration(spent["other"]),
        "samples": samples_section(*samples) if samples else "",
        "how_to_use": how_to_use(block_size, changed),
        "limits": limits(block_size, epochs, "some of its training text" if mixed else "its training text"),
        "data_license": f" The training data, {source}, is under {data_license}." if data_license else "",
    }
    template = Path(__file__).with_name("card.md").read_text(encoding="utf-8")
    return template.format_map(facts | computed)


def is_mix(facts: dict[str, Any]) -> bool:
    """Whether a run trains on several data sets."""
    return len(facts["data"].get("parts", {})) > 1


def is_on_hub(name: str | None) -> bool:
    """Whether a name has the form of the Hub's, OWNER/NAME, and no folder here has it."""
    return name is not None and HUB_NAME.fullmatch(name) is not None and not Path(name).exists()


def hub_link(name: str, folder: str = "") -> str:
    return f"[{name}](https://huggingface.co/{folder}{name})"


def measured_at(step: int, facts: dict[str, Any], events: dict[str, curves.Points]) -> list[Any]:
    """What was measured of the weights of this very step, as the Hub's `EvalResult`s."""
    from huggingface_hub import EvalResult

    dataset = facts["data"]["dataset"]
    loss: dict[str, Any] = {
        "dataset_type": dataset if is_on_hub(dataset) else "text",
        "dataset_name": dataset or facts["data"].get("text") or "text of unrecorded source",
        "metric_type": "loss",
        "metric_name": f"validation loss, nats per {curves.unit_of(facts)}, "
        f"on {facts['val_tokens']:,} tokens held out",
    }
    accuracy: dict[str, Any] = {
        "dataset_type": "Rowan/hellaswag",
        "dataset_name": "HellaSwag",
        "dataset_split": "validation",
        "metric_type": "acc_norm",
        "metric_name": f"accuracy by loss per token (acc_norm), {facts['hellaswag_items']:,} items",
    }
    return [
        EvalResult(task_type="text-generation", task_name="Text generation", metric_value=value, **about)
        for kind, about in (("val", loss), ("hella", accuracy))
        for at, value in events[kind]
        if at == step
    ]


def results_section(at: int, facts: dict[str, Any], events: dict[str, curves.Points], picture: bool) -> str:
    """The run's evaluations as a table, evenly picked, beside published values; and the picture. `at` is the
    checkpoint's step."""
    losses, scores = (curves.measured_alike(facts, events, kind) for kind in ("val", "hella"))
    steps = sorted(losses | scores)
    if not steps:
        return ""
    n, batch = min(TABLE_ROWS, len(steps)), facts["train_config"]["total_batch_size"]
    picked = [steps[round((i + 1) * len(steps) / n) - 1] for i in range(n)]  # the last step is among them
    columns = ["step", "tokens", f"validation loss, nats per {curves.unit_of(facts)}", "HellaSwag, acc_norm"]
    rows = [columns, ["---"] * 4]
    for step in picked:
        values = [f"{measured[step]:.4f}" if step in measured else "" for measured in (losses, scores)]
        rows.append([f"{step:,}", f"{step * batch:,}", *values])
    published = [
        f"{curves.GPT2_VAL_LOSS}" if losses and curves.comparable_loss(facts) else "",
        f"{curves.GPT2_HELLASWAG}" if scores and curves.comparable_hellaswag(facts) else "",
    ]
    if any(published):
        rows.append([curves.GPT2, "", *published])
    table = "\n".join(f"| {' | '.join(row if scores else row[:3])} |" for row in rows)
    image = f"![The losses of the run, by tokens trained on]({PICTURE})\n\n" if picture else ""
    mean = "mean of the parts' losses by their shares, on" if is_mix(facts) else "mean over"
    notes = f"The validation loss is the {mean} {facts['val_tokens']:,} tokens held out from training."
    if losses:
        best = min(losses, key=lambda step: losses[step])
        here = ", that of this checkpoint" if best == at else ""
        notes += f" The lowest was {losses[best]:.4f}, at step {best:,}{here}."
    if scores and facts["hellaswag_items"]:  # a run that was resumed without them does not know how many
        notes += (
            f" HellaSwag: {facts['hellaswag_items']:,} items of the validation split, the ending with the "
            "lowest mean loss per token wins; lm-evaluation-harness, which divides by characters, gives "
            "other numbers."
        )
    return f"## Results\n\n{image}{table}\n\n{notes}\n\n"


def samples_section(step: int, texts: list[str]) -> str:
    """Texts sampled at `step`, as Markdown's indented code: whatever they hold is shown as it is."""
    samples = f"\n    {'-' * 20}\n".join("    " + printable(text) for text in texts)
    return f"## Samples\n\nWritten at step {step:,}, not selected:\n\n{samples}\n\n"
