"""
A checkpoint's model card: the README.md that the Hugging Face Hub shows as the model's page.

The card says only what is known. A license is the choice of whoever publishes the weights, so none is
claimed; a language is named only for datasets whose language is known.
"""

import functools
import re
from pathlib import Path
from typing import Any

from support import VERSION
from support.cli import duration, plural, printable
from support.model.huggingface import how_to_use, limits, metadata, model_name
from support.run.curves import GPT2_HELLASWAG, GPT2_VAL_LOSS, Points, comparable_hellaswag, comparable_loss

PICTURE = "loss.png"  # beside the card; both are for people: no program here reads them back
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
TABLE_ROWS = 10  # at most, of the evaluations

# Language and license of the datasets whose cards on the Hub we know.
KNOWN_DATASETS = {
    "HuggingFaceFW/fineweb-edu": ("en", "ODC-By 1.0"),
    "HuggingFaceFW/fineweb": ("en", "ODC-By 1.0"),
}


def run_card(
    facts: dict[str, Any],
    step: int,
    spent: dict[str, float],
    events: dict[str, Points],
    samples: tuple[int, list[str]] | None,
    picture: bool,
) -> str:
    """The card of a run's checkpoint.

    Args:
        facts: what run.json records.
        step: of the checkpoint.
        spent: seconds of "training" and of everything "other", and the "tokens" trained on.
        events: the run's log up to `step`.
        samples: the step of the latest ones, and their texts.
        picture: whether loss.png lies beside the card.
    """
    config, encoding = facts["train_config"], facts["encoding"]
    name = model_name(facts["parameters"])
    tokens = step * config["total_batch_size"]
    epochs = tokens / facts["data"]["train_tokens"]
    unfinished = f" Training was to go on until step {config['max_steps']:,}." * (step < config["max_steps"])
    parts = [
        metadata(encoding, **known_of(facts), model_name=name, eval_results=results_at(step, facts, events)),
        f"# {name}\n",
        f"A GPT-2 of {facts['parameters']:,} parameters, trained {origin(facts)} on {dataset_of(facts)}: "
        f"{tokens:,} tokens in {plural(step, 'step')}.{unfinished}\n",
        *evaluations(facts, events, picture),
        "## Training\n",
        training_table(facts, step, spent, epochs),
    ]
    if samples:
        texts = f"\n    {'-' * 20}\n".join("    " + printable(text) for text in samples[1])
        parts += [f"## Samples\n\nWritten at step {samples[0]:,}, not selected:\n", f"{texts}\n"]
    block_size = facts["model_config"]["block_size"]
    parts += ["## How to use it\n", how_to_use(encoding, block_size),
              "## Limits\n", limits(block_size, epochs),
              "## License\n", license_of(facts)]  # fmt: skip
    return "\n".join(parts)


def known_of(facts: dict[str, Any]) -> dict[str, Any]:
    """The metadata that follow from the data and the first weights."""
    dataset, init_from = facts["data"]["dataset"], facts["train_config"]["init_from"]
    return {
        "datasets": [dataset] if is_on_hub(dataset) else None,
        "language": KNOWN_DATASETS[dataset][0] if dataset in KNOWN_DATASETS else None,
        "base_model": hub_model(init_from),
    }


def is_on_hub(name: str | None) -> bool:
    """Whether a name has the form of the Hub's, OWNER/NAME, and no folder here has it."""
    return name is not None and HUB_NAME.fullmatch(name) is not None and not Path(name).exists()


def hub_model(init_from: str | None) -> str | None:
    """The full name on the Hub of the model that a run began with; None if it was none of the Hub's."""
    if init_from is None or Path(init_from).exists():
        return None
    name = init_from if "/" in init_from else f"openai-community/{init_from}"
    return name if is_on_hub(name) else None


def results_at(step: int, facts: dict[str, Any], events: dict[str, Points]) -> list[Any]:
    """What was measured of these very weights, as the Hub's results."""
    from huggingface_hub import EvalResult

    result = functools.partial(EvalResult, task_type="text-generation", task_name="Text generation")
    dataset, results = facts["data"]["dataset"], []
    if (loss := dict(events["val"]).get(step)) is not None:
        kind = dataset if is_on_hub(dataset) else "text"
        unit = "byte" if facts["encoding"] == "bytes" else "token"
        metric = f"validation loss, nats per {unit}, on {facts['val_tokens']:,} tokens held out"
        results.append(result(dataset_type=kind, dataset_name=dataset or "text of unrecorded source",
                              metric_type="loss", metric_name=metric, metric_value=loss))  # fmt: skip
    if (score := dict(events["hella"]).get(step)) is not None:
        metric = f"accuracy by loss per token (acc_norm), {facts['hellaswag_items']:,} items"
        results.append(result(dataset_type="Rowan/hellaswag", dataset_name="HellaSwag",
                              dataset_split="validation", metric_type="acc_norm", metric_name=metric,
                              metric_value=score))  # fmt: skip
    return results


def origin(facts: dict[str, Any]) -> str:
    """What the run began with."""
    init_from = facts["train_config"]["init_from"]
    if init_from is None:
        return "from scratch"
    if name := hub_model(init_from):
        return f"from the weights of [{name}](https://huggingface.co/{name})"
    return "from the weights of an earlier run"  # its folder's name means nothing elsewhere


def dataset_of(facts: dict[str, Any]) -> str:
    name = facts["data"]["dataset"]
    if is_on_hub(name):
        return f"[{name}](https://huggingface.co/datasets/{name})"
    return name or "text whose source its shards do not record"


def evaluations(facts: dict[str, Any], events: dict[str, Points], picture: bool) -> list[str]:
    """The run's evaluations as a table, evenly picked, beside published values; and the picture."""
    losses, scores = dict(events["val"]), dict(events["hella"])
    steps = sorted(losses | scores)
    if not steps:
        return []
    n = min(TABLE_ROWS, len(steps))
    picked = [steps[round((i + 1) * len(steps) / n) - 1] for i in range(n)]  # the last one is among them
    unit = "byte" if facts["encoding"] == "bytes" else "token"
    per_step = facts["train_config"]["total_batch_size"]
    rows = [(f"{step:,}", f"{step * per_step:,}", *(f"{values[step]:.4f}" if step in values else ""
             for values in (losses, scores))) for step in picked]  # fmt: skip
    published = [f"{GPT2_VAL_LOSS}" if losses and comparable_loss(facts) else "",
                 f"{GPT2_HELLASWAG}" if scores and comparable_hellaswag(facts) else ""]  # fmt: skip
    if any(published):
        rows.append(("OpenAI's GPT-2 (124M)", "", *published))
    columns = ("step", "tokens", f"validation loss, nats per {unit}", "HellaSwag, acc_norm")
    lines = [columns, ("---",) * 4, *rows]
    width = 4 if scores else 3
    notes = [f"The validation loss is the mean over {facts['val_tokens']:,} tokens held out from training."]
    if scores:
        notes.append(
            f"HellaSwag: {facts['hellaswag_items']:,} items of the validation split, the ending with the "
            "lowest mean loss per token wins; lm-evaluation-harness, which divides by characters, gives "
            "other numbers."
        )
    table = "\n".join(f"| {' | '.join(line[:width])} |" for line in lines)
    image = [f"![The losses of the run, by tokens trained on]({PICTURE})\n"] if picture else []
    return ["## Results\n", *image, f"{table}\n", f"{' '.join(notes)}\n"]


def training_table(facts: dict[str, Any], step: int, spent: dict[str, float], epochs: float) -> str:
    """How the model was trained."""
    config, data, made = facts["train_config"], facts["data"], facts["versions"]
    muon = "Muon for the blocks' matrices, AdamW for the rest"
    optimizer = muon if config["optimizer"] == "muon" else "AdamW"
    clipping = f"gradients clipped at {config['grad_clip']:g}" if config["grad_clip"] else "no clipping"
    part = " (of the part after the last interruption)" if facts["interruptions"] else ""
    shape = facts["model_config"]
    rows = {
        "architecture": f"{shape['n_layer']} layers, {shape['n_head']} heads, width {shape['n_embd']}, block "
        f"size {shape['block_size']}, vocabulary {shape['vocab_size']:,} ({shape['encoding']})",
        "data": f"{data['train_tokens']:,} training tokens, read {epochs:.2f} times; fingerprint "
        f"`{data['fingerprint'][:16]}`",
        "recipe": f"`--recipe {config['recipe']}`, with these values:",
        "optimizer": f"{optimizer}; weight decay {config['weight_decay']:g}, {clipping}",
        "learning rate": f"{config['schedule']}, at most {config['max_lr']:.2g}, "
        f"{plural(config['warmup_steps'], 'step')} of warm-up, planned for {config['max_steps']:,}",
        "batch": f"{config['total_batch_size']:,} tokens, in rows of {config['sequence_length']:,}",
        "seed": f"{config['seed']}",
        "hardware": f"{facts['device']}; {plural(facts['world_size'], 'process')}{part}",
        "precision": f"{facts['precision']}{part}",
        "interruptions": f"{facts['interruptions']}",
        "software": f"`train_gpt2.py` {VERSION}"
        + (f", commit `{made['commit'][:12]}`" if made["commit"] else "")
        + f"; PyTorch {made['torch']}, Python {made['python']}{part}",
    }  # fmt: skip
    if spent:
        rows["time"] = (f"{duration(spent['training'])} of training, {duration(spent['other'])} of "
                        "evaluation, saving and start-up")  # fmt: skip
    return "| | |\n| --- | --- |\n" + "".join(f"| {name} | {value} |\n" for name, value in rows.items())


def license_of(facts: dict[str, Any]) -> str:
    text = "No license is stated for these weights: that is the choice of whoever trained them."
    dataset = facts["data"]["dataset"]
    if dataset in KNOWN_DATASETS:
        text += f" The training data, {dataset_of(facts)}, is under {KNOWN_DATASETS[dataset][1]}."
    return f"{text}\n"
