"""
What a run says of itself: the table at its start, a line or a bar while it trains, the table at its end, and
the facts in run.json. Also where it says it: the terminal, a file, wandb or trackio.
"""

import importlib
import importlib.util
import math
import shlex
import shutil
import statistics
import sys
import textwrap
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, fields
from typing import Any

from tqdm import tqdm

import plot
from device import choose_attention, device_name, peak_flops
from run_folder import versions
from shards import InputError

# Validation losses of a healthy run of the default recipe (build-nanogpt, pull request 30).
HEALTHY_LOSS = {250: 6.16, 1000: 4.15, 1250: 3.95}
TOLERANCE = 0.03  # a loss higher by more than this share is not healthy
MANY_EPOCHS = 20


def gather_facts(
    config: Any, model: Any, shards: Any, layout: Any, *, dtype: Any, compile_note: str,
    memory: str, micro_batch_size: int, val_tokens: int, hellaswag_items: int,
) -> dict[str, Any]:  # fmt: skip
    """What run.json records: all that a reader needs to know, or to repeat the run."""
    return {
        "train_config": asdict(config),
        "model_config": asdict(model.config),
        "parameters": model.config.n_parameters,
        "encoding": shards.encoding,
        "data": {
            "dataset": shards.dataset,
            "fingerprint": shards.fingerprint,
            "train_tokens": shards.count("train"),
            "train_shards": len(shards.files["train"]),
        },
        "device": device_name(layout.device),
        "world_size": layout.world_size,
        "precision": f"{str(dtype).removeprefix('torch.')}, torch.compile {compile_note}",
        "attention": "the first that works of "
        + ", ".join(backend.name.lower() for backend in choose_attention(layout.device)),
        "memory": memory + (", the blocks recomputed" if model.recompute else ""),
        "micro_batch_size": micro_batch_size,
        "loss_chunks": model.loss_chunks,
        "grad_accum_steps": config.total_batch_size
        // (micro_batch_size * config.sequence_length * layout.world_size),
        "val_tokens": val_tokens,
        "hellaswag_items": hellaswag_items,
        "versions": versions(),
    }


def describe(config: Any, facts: dict[str, Any]) -> str:
    """What a person about to spend 50 hours wants to know, as a table."""
    tokens, data, model = config.max_steps * config.total_batch_size, facts["data"], facts["model_config"]
    rows = {
        "device": f"{facts['device']}; {plural(facts['world_size'], 'process', 'es')}",
        "precision": facts["precision"],
        "attention": facts["attention"],
        "memory": facts["memory"],
        "model": f"{facts['parameters']:,} parameters: {model['n_layer']} layers, {model['n_head']} heads, "
        f"width {model['n_embd']}, block size {model['block_size']}, vocabulary {model['vocab_size']:,} "
        f"({model['encoding']})",
        "data": f"{config.data_dir}: {data['train_tokens']:,} training tokens, {data['train_shards']} shards",
        "training": f"{config.max_steps:,} steps, {tokens:,} tokens, "
        f"{tokens / data['train_tokens']:.2f} epochs",
        "batch": f"{config.total_batch_size:,} tokens a step = {facts['micro_batch_size']} rows x "
        f"{config.sequence_length} tokens x {plural(facts['world_size'], 'process', 'es')} x "
        f"{plural(facts['grad_accum_steps'], 'micro-step', 's')}",
        "validation": f"{facts['val_tokens']:,} tokens every {config.val_every} steps",
        "HellaSwag": f"{facts['hellaswag_items']:,} items every {config.hellaswag_every} steps",
        "run folder": str(config.log_dir),
    }
    if not config.val_every:
        rows["validation"] = "off"
    if not facts["hellaswag_items"]:
        rows["HellaSwag"] = "off"
    if config.dollars_per_hour:
        rows["cost"] = f"${config.dollars_per_hour:,.2f} an hour, ${facts['dollars_so_far']:,.2f} so far"
    if config.warmup_steps >= config.max_steps:
        rows["note"] = f"the warm-up ({config.warmup_steps} steps) is as long as the run; see --warmup_steps"
    elif tokens > MANY_EPOCHS * data["train_tokens"]:
        rows["note"] = f"more than {MANY_EPOCHS} epochs: a model may learn the text by heart; see --max_steps"
    lines = [f"{name + ':':12} {value}" for name, value in rows.items()]
    if sys.stdout.isatty():
        width = max(60, shutil.get_terminal_size().columns - 1)
        wrapper = textwrap.TextWrapper(width, subsequent_indent=13 * " ", break_on_hyphens=False)
        lines = [wrapper.fill(line) for line in lines]
    return "\n".join(lines)


def readable(text: str) -> str:
    """A model's text for a terminal: its line breaks indented, other white space as a space, what else can't
    be shown as "�"."""
    lines = text.replace("\r\n", "\n").split("\n")
    return "\n    ".join(
        "".join(c if c.isprintable() else " " if c.isspace() else "\N{REPLACEMENT CHARACTER}" for c in line)
        for line in lines
    )


def plural(n: int, word: str, ending: str) -> str:
    return f"{n} {word}{ending if n > 1 else ''}"


def check_tracker(name: str | None) -> None:
    """Raises InputError unless the tracker of this name is installed."""
    if name is not None and importlib.util.find_spec(name) is None:
        raise InputError(f"--tracker {name}: it is not installed; pip install {name}")


def duration(seconds: float) -> str:
    """12 days, 13 h 20 min, 11 min, 2 min 33 s, 45 s."""
    seconds = round(seconds)
    if seconds < 90:
        return f"{seconds} s"
    if seconds < 600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    if hours >= 100:
        return f"{hours / 24:,.0f} days"
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min"


class Progress:
    """The main process's voice: on a terminal one bar, with events above it; elsewhere the tutorial's lines,
    at most one a second. What it is told also goes to the tracker, if there is one."""

    def __init__(self, config: Any, layout: Any):
        self.config, self.is_main = config, layout.is_main
        self.on_terminal = sys.stderr.isatty()
        self.peak = peak_flops(device_name(layout.device))  # of each device; None where it is not known
        self.world_size = layout.world_size
        self.last_line = -math.inf
        self.step_seconds: deque[float] = deque(maxlen=20)  # of the last steps
        self.n_steps = 0  # trained since the start
        self.warned = self.estimated = False
        self.began = self.shown = 0.0  # when what may take long began, and was last told of
        self.tracker: Any = None  # the module wandb or trackio, which share what is used of them here

    def start(self, first_step: int, facts: dict[str, Any], flops_per_token: int) -> None:
        self.facts, self.flops_per_token = facts, flops_per_token
        if facts["precision"].startswith("float32"):
            self.peak = None  # the table's peaks are of 16 bits
        self.say(describe(self.config, facts))
        if self.config.tracker and self.is_main:
            self.track(self.start_tracker)
        silent = not (self.is_main and self.on_terminal)
        self.bar = tqdm(total=self.config.max_steps, initial=first_step, disable=silent, dynamic_ncols=True,
                        bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}")  # fmt: skip

    def start_tracker(self) -> None:
        self.tracker = importlib.import_module(self.config.tracker)
        run_id = self.facts["run_id"]  # the name tells runs apart, and finds one again after --resume
        options = {"id": run_id} if self.config.tracker == "wandb" else {}
        name = f"{self.config.log_dir.resolve().name}-{run_id}"
        self.tracker.init(project="gpt2", name=name, config=self.facts, resume="allow", **options)

    def say(self, text: str) -> None:
        """One event, above the bar."""
        if self.is_main:
            tqdm.write(text)
            sys.stdout.flush()

    def track(self, send: Callable[[], object]) -> None:
        """Send something to the tracker. It is never worth a run: if it fails, training goes on without
        it."""
        try:
            send()
        except Exception as error:
            self.tracker = None
            self.say(f"--tracker {self.config.tracker} failed, training goes on without it: {error}")

    def measured(self, step: int, values: dict[str, float], text: str) -> None:
        """An evaluation's values, and how to say them."""
        self.bar.set_postfix_str("", refresh=False)  # what `doing` has left there
        self.say(f"step {step}: {text}")
        if self.tracker:
            self.track(lambda: self.tracker.log(values, step=step))
        warning = unhealthy(self.config, self.facts, step, values.get("val/loss", 0.0))
        if warning and not self.warned:
            self.warned = True
            self.say(warning)

    def doing(self, what: str, done: int, total: int) -> None:
        """A sign of life in what may take long, of which `done` of `total` parts are done: on a terminal in
        the bar, elsewhere a line every minute."""
        now = time.monotonic()
        if done == 0:
            self.began = self.shown = now
        if not self.is_main or now - self.shown < (0.5 if self.on_terminal else 60):
            return
        self.shown = now
        text = f"{what} {done}/{total}, {duration((now - self.began) / done * (total - done))} left"
        self.bar.set_postfix_str(text) if self.on_terminal else self.say(text)

    def micro_step(self, step: int, done: int, total: int) -> None:
        """`done` of the `total` micro-steps of a step are done."""
        if self.step_seconds and self.step_seconds[-1] < 60:  # then the last step's values are worth more
            return
        self.doing(f"step {step}: micro-step", done, total)
        elapsed = time.monotonic() - self.began
        if done and elapsed > 30 and not self.estimated:
            self.estimate(elapsed / done * total, self.config.max_steps - step)

    def estimate(self, seconds: float, steps: int) -> None:
        """What `steps` steps of so many seconds will take, said once."""
        self.estimated = True
        cost = self.config.dollars_per_hour and self.config.dollars_per_hour * seconds * steps / 3600
        self.say(f"training will take about {duration(seconds * steps)}" + (f", ${cost:,.2f}" if cost else "")
                 + f" ({duration(seconds) if seconds >= 10 else f'{seconds:.2f} s'} a step)")  # fmt: skip

    def step(self, step: int, loss: float, lr: float, norm: float, seconds: float) -> None:
        """One training step, in nats and seconds."""
        if not self.is_main:
            return
        self.n_steps += 1
        self.step_seconds.append(seconds)
        rate = self.config.total_batch_size / seconds
        mfu = rate * self.flops_per_token / (self.peak * self.world_size) if self.peak else None
        typical = statistics.median(self.step_seconds)
        left = self.config.max_steps - step - 1
        if self.on_terminal:
            every = self.config.val_every
            until = min(left, every - 1 - step % every) if every else 0
            wide = shutil.get_terminal_size().columns >= 110
            parts = [
                f"loss {loss:.3f}",
                f"lr {lr:.1e} norm {norm:.2f}" if wide else "",
                f"{rate:,.0f} tok/s",
                f"MFU {mfu:.0%}" if mfu else "",
                f"| evaluation in {duration(until * typical)}" if wide and until else "",
                f"| left {duration(left * typical)}",
            ]
            self.bar.set_postfix_str(" ".join(part for part in parts if part), refresh=False)
            self.bar.update()
        elif time.monotonic() - self.last_line >= 1:
            self.last_line = time.monotonic()
            self.say(f"step {step:5d} | loss: {loss:.6f} | lr {lr:.4e} | norm: {norm:.4f} | "
                     f"dt: {1000 * seconds:.2f}ms | tok/sec: {rate:.2f}"
                     + (f" | mfu: {mfu:.1%}" if mfu else ""))  # fmt: skip
        if self.tracker:
            values = {"train/loss": loss, "train/lr": lr, "train/norm": norm, "tokens_per_second": rate}
            self.track(lambda: self.tracker.log(values | ({"mfu": mfu} if mfu else {}), step=step))
        if (self.n_steps == 5 or seconds > 30) and not self.estimated:  # the first is slower: it allocates
            self.estimate(min(self.step_seconds), left)

    def close(self) -> None:
        self.bar.close()
        if self.tracker:
            self.track(self.tracker.finish)


def is_default_recipe(config: Any, facts: dict[str, Any]) -> bool:
    """Whether a run can be held against published ones: this recipe, this data."""
    recipe = ("init_from", "sequence_length", "total_batch_size", "max_steps", "warmup_steps", "max_lr",
              "weight_decay", "grad_clip", "model", "n_layer", "n_head", "n_embd")  # fmt: skip
    same = all(
        getattr(config, field.name) == field.default for field in fields(config) if field.name in recipe
    )
    return same and plot.comparable_loss(facts)


def unhealthy(config: Any, facts: dict[str, Any], step: int, val_loss: float) -> str | None:
    """A warning when a run of the default recipe leaves the band of healthy ones; None if all is well, or
    nothing is known."""
    if step not in HEALTHY_LOSS or not is_default_recipe(config, facts):
        return None
    if val_loss <= (1 + TOLERANCE) * HEALTHY_LOSS[step]:
        return None
    return (
        f"WARNING: healthy runs of this recipe have a validation loss of about {HEALTHY_LOSS[step]} at step "
        f"{step}, this one {val_loss:.2f}. The usual causes: shards of other data or another encoding, "
        "changed code, a device or driver that computes wrongly (see a few steps with --dtype float32 "
        "--no_compile)"
    )


def result_of(
    config: Any, facts: dict[str, Any], step: int, spent: dict[str, float], val_loss: float, score: Any
) -> dict[str, Any]:
    """What run.json keeps of the end: losses in nats, times in hours."""
    tokens, hours = step * config.total_batch_size, (spent["training"] + spent["other"]) / 3600
    return {
        "validation_loss": None if math.isnan(val_loss) else round(val_loss, 4),
        "hellaswag": score and {"acc": score.acc, "acc_norm": score.acc_norm, "items": score.n,
                                "standard_error": score.standard_error(score.acc_norm)},
        "tokens": tokens,
        "training_hours": spent["training"] / 3600,
        "other_hours": spent["other"] / 3600,
        "tokens_per_second": spent["tokens"] / spent["training"] if spent["training"] else None,
        "dollars": config.dollars_per_hour and config.dollars_per_hour * hours,
        "interruptions": facts["interruptions"],
    }  # fmt: skip


def closing_table(config: Any, facts: dict[str, Any], result: dict[str, Any]) -> str:
    """The end of a run, beside published figures where the comparison is fair."""
    rows, default = [], is_default_recipe(config, facts)
    if result["validation_loss"] is not None:
        fair = f"OpenAI's GPT-2 {plot.GPT2_VAL_LOSS}" + (", healthy runs 3.02 to 3.09" if default else "")
        rows.append(
            ("validation loss", f"{result['validation_loss']:.4f}", plot.comparable_loss(facts) and fair)
        )
    if score := result["hellaswag"]:
        fair = f"OpenAI's GPT-2 {plot.GPT2_HELLASWAG}" + (", healthy runs .300 to .313" if default else "")
        value = f"{score['acc_norm']:.4f} +- {score['standard_error']:.4f} on {score['items']:,} items"
        rows.append(("HellaSwag", value, plot.comparable_hellaswag(facts) and fair))
    hours = 3600 * result["training_hours"], 3600 * result["other_hours"]
    rows.append(("tokens", f"{result['tokens']:,}", None))
    rows.append(("time", f"{duration(hours[0])} of training, {duration(hours[1])} of everything else", None))
    if result["tokens_per_second"]:
        rows.append(("speed", f"{result['tokens_per_second']:,.0f} tokens/s, the mean of all steps", None))
    if result["dollars"] is not None:
        rows.append(("cost", f"${result['dollars']:,.2f}", None))
    rows.append(("interruptions", str(result["interruptions"]), None))
    table = [f"{name + ':':17}{value}" + (f" ({fair})" if fair else "") for name, value, fair in rows]
    folder = shlex.quote(str(config.log_dir))
    next_steps = [f"python sample.py --model {folder}"] if config.checkpoint_every else []
    next_steps.append(f"python plot.py run {folder}")
    return "\n".join([*table, f"next:            {'; '.join(next_steps)}"])
