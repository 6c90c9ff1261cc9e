"""
What a run reports: a table at the start, lines or a bar during training, a table at the end, and the facts
in run.json. It reports to the terminal, to log.txt, to status.json, and to wandb or trackio.
"""

import contextlib
import functools
import importlib
import importlib.util
import math
import shlex
import shutil
import statistics
import sys
import textwrap
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from support.cli import InputError, duration, plural, printable
from support.machine import device as devices
from support.machine.micro_batch import Fit
from support.machine.processes import World
from support.run import curves
from support.run.folder import RunFolder, versions

import torch
from tqdm import tqdm

if TYPE_CHECKING:
    from hellaswag import Score
    from train_gpt2 import GPT, TokenLoader, TrainConfig

# Validation losses of a healthy run of the default recipe (build-nanogpt, pull request 30).
HEALTHY_LOSS = {250: 6.16, 1000: 4.15, 1250: 3.95}
TOLERANCE = 0.03  # A healthy loss is higher by at most this share.
MANY_EPOCHS = 20
A_LONG_TIME = 48 * 3600  # seconds
EVENTS_KEPT = 200  # status.json has at most so many.
LITTLE_DATA = 1_000_000  # training tokens
# The format of values in log.txt, and their names for trackers; another value keeps its name.
FORMATS = {"train": ".6f", "val": ".4f", "hella": ".4f"}
TRACKER_NAMES = {
    "train": "train/loss",
    "val": "val/loss",
    "hella": "hellaswag/acc_norm",
    "lr": "train/lr",
    "norm": "train/norm",
}
Facts = dict[str, Any]  # run.json: all that one needs to understand or repeat the run, as plain values


# -----------------------------------------------------------------------------
# the facts of a run, and its tables


def facts_of(
    run: RunFolder,
    raw_model: "GPT",
    optimizer: torch.optim.Optimizer,
    fit: Fit,
    val_loaders: "list[TokenLoader]",
    n_items: int,
) -> Facts:
    """What run.json records before the first step."""
    config, world, shards, shape = run.config, run.world, run.shards, raw_model.config
    dtype = devices.choose_dtype(config.dtype, world.device, shape.n_embd)
    compiler = devices.choose_compile(config.compile, world.device)[1]
    if fit.compiler_fault:
        compiler = f"off: it failed ({fit.compiler_fault})"
    grad_accum_steps = config.total_batch_size // (config.sequence_length * fit.rows * world.size)
    padding = raw_model.transformer.wte.weight.size(0) - shape.vocab_size  # rows without a token
    val_tokens, before = sum(loader.n_windows for loader in val_loaders) * config.sequence_length, run.before
    since = {  # from which step on values are measured on as many tokens, or items; without items, as before
        f"{kind}_since": run.first_step if n and before.get(name, n) != n else before.get(f"{kind}_since", 0)
        for kind, name, n in (("val", "val_tokens", val_tokens), ("hella", "hellaswag_items", n_items))
    }
    return {
        "train_config": asdict(config),
        "model_config": asdict(shape),
        "default_recipe": is_default_recipe(run),
        "parameters": sum(p.numel() for p in raw_model.parameters()) - padding * shape.n_embd,
        "changed": raw_model.change_from_gpt2(),
        "flops_per_token": shape.flops_per_token(config.sequence_length),
        "val_tokens": val_tokens,
        "hellaswag_items": n_items,
        **since,
        "encoding": shards.encoding,
        "data": {
            "dataset": shards.source.get("dataset"),
            "config": shards.source.get("config"),
            "fingerprint": shards.fingerprint,
            "train_tokens": shards.count("train"),
            "train_shards": len(shards.files["train"]),
            "text": shards.describe(),
            "parts": dict(zip(shards.names(), shards.proportions(), strict=True)),
            "epochs_a_token": {
                name: share / part.count("train")
                for name, share, part in zip(
                    shards.names(), shards.proportions(), shards.parts or [shards], strict=True
                )
            },
        },
        "device": devices.device_name(world.device),
        "world_size": world.size,
        "optimizer": type(optimizer).__name__,
        "precision": f"{str(dtype).removeprefix('torch.')}, torch.compile {compiler}",
        "attention": devices.attention_name(world.device, dtype, shape.n_embd // shape.n_head),
        "memory": fit.memory + (", the blocks recomputed" if config.recompute else ""),
        "micro_batch_size": fit.rows,
        "loss_chunks": fit.loss_chunks,
        "grad_accum_steps": grad_accum_steps,
        "warm_up_step_seconds": fit.seconds and fit.seconds * grad_accum_steps,
        "versions": versions(),
        "run_id": run.run_id,
        "interruptions": run.interruptions,
        "plans": run.plans,
    }


def is_default_recipe(run: RunFolder) -> bool:
    """Whether a run's losses compare with published ones, given the same data: only the seed and the order
    of the data may differ."""
    return all(run.recipe[name] == run.defaults[name] for name in run.defaults.keys() - {"seed", "shuffle"})


def table(rows: dict[str, str | None], indent: int, width: int = sys.maxsize) -> str:
    """Lines of a name and a value, without the rows that have no value."""
    wrapper = textwrap.TextWrapper(width, subsequent_indent=indent * " ", break_on_hyphens=False)
    return "\n".join(wrapper.fill(f"{name + ':':{indent}}{value}") for name, value in rows.items() if value)


def opening_table(facts: Facts, config: "TrainConfig", dollars_so_far: float | None, first_step: int) -> str:
    """The table at the start: what you want to know before spending 50 hours on a run."""
    data, model, processes = facts["data"], facts["model_config"], plural(facts["world_size"], "process")
    tokens = config.max_steps * config.total_batch_size
    seconds = (facts["warm_up_step_seconds"] or 0) * (config.max_steps - first_step)
    price, mixed = config.dollars_per_hour, data.get("parts", {})
    rows = {
        "device": f"{facts['device']}; {processes}",
        "precision": facts["precision"],
        "attention": facts["attention"],
        "memory": facts["memory"],
        "model": f"{facts['parameters']:,} parameters: {model['n_layer']} layers, {model['n_head']} heads, "
        f"width {model['n_embd']}, block size {model['block_size']}, vocabulary {model['vocab_size']:,} "
        f"({model['encoding']})",
        "data": f"{' '.join(map(str, config.data_dir))}: {data['train_tokens']:,} training tokens, "
        + plural(data["train_shards"], "shard"),
        "mix": ", ".join(f"{name} {part:.1%}" for name, part in mixed.items()) if len(mixed) > 1 else None,
        "recipe": f"{config.recipe}: {facts['optimizer']}, {config.schedule}, at most {config.max_lr:.2g}",
        "training": f"{plural(config.max_steps, 'step')}, {tokens:,} tokens, "
        f"{'up to ' if len(mixed) > 1 else ''}{curves.epochs(facts, tokens):.2f} epochs",
        "batch": f"{config.total_batch_size:,} tokens a step = {plural(facts['micro_batch_size'], 'row')} x "
        f"{config.sequence_length} tokens x {processes} x {plural(facts['grad_accum_steps'], 'micro-step')}",
        "validation": f"{facts['val_tokens']:,} tokens every {plural(config.val_every, 'step')}",
        "HellaSwag": f"{facts['hellaswag_items']:,} items every {plural(config.hellaswag_every, 'step')}",
        "run folder": str(config.log_dir),
    }
    if not config.val_every:
        rows["validation"] = "off"
    if not facts["hellaswag_items"]:
        rows["HellaSwag"] = "off"
    if seconds:
        rows["time"] = f"about {duration(seconds)} of training, plus evaluation (estimated from the warm-up)"
        if seconds > A_LONG_TIME and facts["device"].startswith("cpu"):
            rows["time"] += "; on a CPU, try --demo"
    if facts["changed"]:
        rows["export"] = (
            f"not a GPT-2: {facts['changed']}. GPT-2's format has no place for it: checkpoints resume here, "
            "and sample.py reads them; transformers and llama.cpp don't"
        )
    rows["cost"] = price and f"${price:,.2f} an hour, ${dollars_so_far:,.2f} so far"
    rows["note"] = note_on(config, facts)
    width = max(60, shutil.get_terminal_size().columns - 1) if sys.stdout.isatty() else sys.maxsize
    return table(rows, 13, width)


def note_on(config: "TrainConfig", facts: Facts) -> str | None:
    """What the configuration does and its author may not have meant."""
    steps, warm_up = config.max_steps, config.warmup_steps
    rises_until = round((1 - config.cooldown) * steps) if config.schedule == "trapezoid" else steps
    if steps and warm_up > rises_until:
        return (
            f"the learning rate never reaches --max_lr: the warm-up takes {warm_up} steps, and after "
            f"{rises_until} the rate falls or the run ends; see --warmup_steps"
        )
    if curves.epochs(facts, steps * config.total_batch_size) > MANY_EPOCHS:
        return f"more than {MANY_EPOCHS} epochs: the model may memorize the text; lower --max_steps"
    if facts["data"]["train_tokens"] < LITTLE_DATA and not config.init_from:
        return f"less than {LITTLE_DATA:,} tokens: too little to learn a language from"
    return None


def result_of(
    facts: Facts, step: int, spent: dict[str, Any], val_loss: float, score: "Score | None"
) -> dict[str, Any]:
    """The results in run.json: losses in nats, times in hours."""
    config = facts["train_config"]
    training, other = spent["training"] / 3600, spent["other"] / 3600
    return {
        "validation_loss": None if math.isnan(val_loss) else round(val_loss, 4),
        "hellaswag": score
        and {
            "acc": score.acc,
            "acc_norm": score.acc_norm,
            "items": score.n,
            "standard_error": score.standard_error(score.acc_norm),
        },
        "tokens": step * config["total_batch_size"],
        "training_hours": training,
        "other_hours": other,
        "tokens_per_second": spent["tokens"] / spent["training"] if spent["training"] else None,
        "dollars": spent["dollars"],
        "interruptions": facts["interruptions"],
    }


def closing_table(facts: Facts) -> str:
    """The table at the end, with published figures where the comparison is fair."""
    config, result, score = facts["train_config"], facts["result"], facts["result"]["hellaswag"]
    fair_loss, fair_score = curves.comparable_loss(facts), curves.comparable_hellaswag(facts)
    default = facts["default_recipe"] and fair_loss
    rows: dict[str, str | None] = {}
    if result["validation_loss"] is not None:
        healthy = ", healthy runs 3.02 to 3.09" if default else ""
        published = f" ({curves.GPT2} {curves.GPT2_VAL_LOSS}{healthy})" if fair_loss else ""
        rows["validation loss"] = f"{result['validation_loss']:.4f}{published}"
    if score:
        healthy = ", healthy runs .300 to .313" if default else ""
        published = f" ({curves.GPT2} {curves.GPT2_HELLASWAG}{healthy})" if fair_score else ""
        accuracy = f"{score['acc_norm']:.4f} +- {score['standard_error']:.4f} on {score['items']:,} items"
        rows["HellaSwag"] = accuracy + published
    if best := result.get("best_checkpoint"):
        rows["best checkpoint"] = f"{best}, validation loss {result['best_validation_loss']:.4f}"
    training, other = duration(3600 * result["training_hours"]), duration(3600 * result["other_hours"])
    speed, dollars = result["tokens_per_second"], result["dollars"]
    folder = shlex.quote(Path(config["log_dir"]).as_posix())
    sample = f"python sample.py --model {folder}; " if config["checkpoint_every"] else ""
    rows |= {
        "tokens": f"{result['tokens']:,}",
        "time": f"{training} of training, {other} of evaluation, saving and start-up",
        "speed": speed and f"{speed:,.0f} tokens/s, the mean of all steps",
        "cost": None if dollars is None else f"${dollars:,.2f}",
        "interruptions": str(result["interruptions"]),
        "next": f"{sample}python plot.py run {folder}",
    }
    return table(rows, 17)


# -----------------------------------------------------------------------------
# the report


def check_tracker(name: str | None) -> None:
    """Raises InputError unless the tracker of this name is installed."""
    spec = importlib.util.find_spec(name) if name else None
    if name and (spec is None or spec.origin is None):  # without one, it is a folder that wandb has left here
        raise InputError(f"--tracker {name}: it is not installed; pip install {name}")


class Report:
    """Reports for the main process, and keeps time. A terminal shows one bar, with events above it;
    elsewhere, the tutorial's lines appear, at most one per second. Values also go to log.txt and to the
    tracker, if there is one; events and the last values go to status.json, for `plot.py watch`."""

    def __init__(self, config: "TrainConfig", world: World):
        self.config, self.is_main, self.world_size = config, world.is_main, world.size
        self.on_terminal = sys.stderr.isatty()
        self.last_line = -math.inf
        self.step_seconds: deque[float] = deque(maxlen=20)  # durations of the last steps
        self.warned = self.estimated = False
        self.task = ""  # the current long task and its progress
        self.task_began = self.task_shown = 0.0
        self.events: deque[list[Any]] = deque(maxlen=EVENTS_KEPT)  # [Unix time, text], oldest first
        self.status: dict[str, Any] = {"values": {}}  # the part of status.json that steps and evaluations add
        self.status_at = -math.inf  # time of the last status.json
        world.from_main(lambda: check_tracker(config.tracker))
        self.tracker: Any = None  # the module wandb or trackio; both understand the calls below
        self.facts: Facts = {}
        self.started = time.perf_counter()
        self.training_seconds, self.tokens = 0.0, 0  # sums over all parts of the run
        self.earlier_seconds, self.earlier_dollars = 0.0, 0.0  # sums over the parts before

    @property
    def spent(self) -> dict[str, Any]:
        """In all parts of the run: seconds of training and of everything else, tokens trained on, and dollars
        (None if the price is not known)."""
        seconds = time.perf_counter() - self.started
        dollars = self.dollars(seconds - self.earlier_seconds)
        return {
            "training": self.training_seconds,
            "other": seconds - self.training_seconds,
            "tokens": self.tokens,
            "dollars": None if dollars is None else self.earlier_dollars + dollars,
        }

    def take_over(self, spent: dict[str, Any], status: dict[str, Any]) -> None:
        """Count what the parts before have spent: as the checkpoint says, and as the status says, which also
        knows of the work that a crash lost."""
        self.training_seconds, self.tokens = spent["training"], spent["tokens"]
        known = [spent["training"] + spent["other"]]
        with contextlib.suppress(KeyError, TypeError):  # status.json may be another version's
            known.append(status["training_seconds"] + status["other_seconds"])
        self.earlier_seconds = max(known)
        self.started -= self.earlier_seconds  # as if the run had never stopped
        dollars = [of["dollars"] for of in (spent, status) if of.get("dollars") is not None]
        self.earlier_dollars = max(dollars, default=self.dollars(self.earlier_seconds) or 0.0)

    def dollars(self, seconds: float) -> float | None:
        """The price of so much time; None if the price of an hour is not known."""
        return self.config.dollars_per_hour and self.config.dollars_per_hour * seconds / 3600

    def start(
        self,
        run: RunFolder,
        raw_model: "GPT",
        optimizer: torch.optim.Optimizer,
        fit: Fit,
        val_loaders: "list[TokenLoader]",
        *,
        n_items: int,
    ) -> None:
        """Print the table, write run.json, and set up the tracker and the bar. `n_items`: HellaSwag's."""
        self.run = run
        self.facts = facts = facts_of(run, raw_model, optimizer, fit, val_loaders, n_items=n_items)
        run.write_facts(facts)
        # FLOP/s of each device; None for float32, because the known peaks are those of 16-bit types
        self.peak = None if facts["precision"].startswith("float32") else devices.peak_flops(facts["device"])
        status = curves.read_status(run.path) if run.interruptions else {}
        nothing = {"training": 0.0, "other": 0.0, "tokens": 0}
        self.take_over(run.trainer.get("spent", nothing), status)
        if status:  # events stay, even those of steps that run again
            self.events = deque([*status.get("events", []), *self.events], maxlen=EVENTS_KEPT)
            self.status |= {name: status[name] for name in ("samples", "samples_step") if name in status}
            if (step := status.get("samples_step", run.first_step + 1)) <= run.first_step:
                run.samples = step, [text.replace("\n    ", "\n") for text in status["samples"]]
        self.show(opening_table(facts, self.config, self.spent["dollars"], run.first_step))
        self.write_status()
        if self.config.tracker and self.is_main:
            self.track(self.start_tracker)
        self.bar = tqdm(
            total=self.config.max_steps,
            initial=run.first_step,
            disable=not (self.is_main and self.on_terminal),
            dynamic_ncols=True,
            bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}",
        )

    # ------------------------------------------------------------------ values

    def log(self, step: int, tracked: dict[str, float] | None = None, /, **values: float) -> None:
        """Log values of `step` under their names: to log.txt, status.json and the tracker. The pictures draw
        them, and --resume keeps them. Any name will do. `tracked` go to the tracker alone."""
        values = {name: float(value) for name, value in values.items()}  # of a tensor, its number
        formatted = {name: format(value, FORMATS.get(name, ".6g")) for name, value in values.items()}
        self.run.append(step, formatted)  # all at once: on a shared disk, each write takes milliseconds
        for name, value in values.items():
            self.status["values"][name] = [step, value if math.isfinite(value) else None]
        self.write_status()
        if self.tracker:
            named = {TRACKER_NAMES.get(name, name): value for name, value in values.items()}
            self.track(lambda: self.tracker.log(named | (tracked or {}), step=step))

    def step(self, step: int, loss: float, lr: float, norm: float, seconds: float) -> None:
        """Report one training step: its loss in nats, its duration in seconds."""
        self.training_seconds += seconds
        self.tokens += self.config.total_batch_size
        self.step_seconds.append(seconds)
        if not self.is_main:
            return
        rate, typical = self.config.total_batch_size / seconds, statistics.median(self.step_seconds)
        mfu = rate * self.facts["flops_per_token"] / (self.peak * self.world_size) if self.peak else None
        left = self.config.max_steps - step - 1
        self.task = ""
        self.status |= {
            "tokens_per_second": self.config.total_batch_size / typical,
            "mfu": mfu,
            "step_seconds": typical,
            "training_seconds_left": left * typical,
        }
        tracked = {"tokens_per_second": rate}
        self.log(step, tracked | ({"mfu": mfu} if mfu else {}), train=loss, lr=lr, norm=norm)
        if self.on_terminal:
            every = self.config.val_every
            until = min(left, every - 1 - step % every) if every else 0
            wide = shutil.get_terminal_size().columns >= 110
            parts = [
                f"loss {loss:.3f} lr {lr:.1e} norm {norm:.2f}",
                f"{rate:,.0f} tok/s" if wide or rate < 10_000 else f"{rate / 1000:,.0f}k tok/s",
                f"MFU {mfu:.0%}" if wide and mfu else "",
                f"| evaluation in {duration(until * typical)}" if wide and until else "",
                f"| left {duration(left * typical)}",
            ]
            self.bar.set_postfix_str(" ".join(filter(None, parts)), refresh=False)
            self.bar.update()
        elif time.monotonic() - self.last_line >= 1:
            self.last_line = time.monotonic()
            self.show(
                f"step {step:5d} | loss: {loss:.6f} | lr {lr:.4e} | norm: {norm:.4f} | "
                f"dt: {1000 * seconds:.2f}ms | tok/sec: {rate:.2f}" + (f" | mfu: {mfu:.1%}" if mfu else "")
            )
        if len(self.step_seconds) == 5 or seconds > 30:  # the first steps are slow: they allocate
            self.estimate(min(self.step_seconds), left)

    def validation(self, step: int, loss: float, parts: dict[str, float] | None = None) -> None:
        """Report a validation loss, in nats per token, and of a mix the loss of each part; warn once if the
        loss of a default-recipe run is too high."""
        text = f"validation loss {loss:.4f} on {self.facts['val_tokens']:,} tokens"
        mixed = {f"val_{name}": part for name, part in parts.items()} if parts and len(parts) > 1 else {}
        text += "".join(f", {name} {part:.4f}" for name, part in mixed.items())
        self.evaluated(step, text, val=loss, **mixed)
        healthy = HEALTHY_LOSS.get(step)
        fair = healthy and self.facts["default_recipe"] and curves.comparable_loss(self.facts)
        if healthy and fair and not self.warned and not loss <= (1 + TOLERANCE) * healthy:
            self.warned = True
            self.print(
                f"WARNING: healthy runs of this recipe have a validation loss of about {healthy} at step "
                f"{step}, this one {loss:.2f}. The usual causes: shards of other data or another encoding, "
                "changed code, a device or driver that computes wrongly (see a few steps with --dtype "
                "float32 --no_compile)"
            )

    def hellaswag(self, step: int, score: "Score") -> None:
        self.evaluated(step, f"HellaSwag {score}", hella=score.acc_norm)

    def evaluated(self, step: int, text: str, **values: float) -> None:
        """Report the end of an evaluation: print `text`, and log the values."""
        self.task = ""
        self.bar.set_postfix_str("", refresh=False)  # remove the task
        self.print(f"step {step}: {text}")
        self.log(step, **values)

    def samples(self, step: int, texts: list[str]) -> None:
        """Print texts sampled at `step`; the model card shows the latest."""
        self.run.samples = (step, texts)
        self.status |= {"samples": [printable(text) for text in texts], "samples_step": step}
        for text in self.status["samples"]:
            self.show(f"step {step}: sample: {text}")
        self.write_status()

    # ------------------------------------------------------------------ long tasks

    def progress_of(self, what: str) -> Callable[[int, int], None]:
        """A callback (parts done, parts in all) that shows the progress of a long task."""
        return functools.partial(self.sign_of_life, what)

    def sign_of_life(self, what: str, done: int, total: int) -> None:
        """Show that `done` of `total` parts are done: in a terminal's bar, elsewhere a line every minute."""
        now = time.monotonic()
        if done == 0:
            self.task_began = self.task_shown = now
        if not self.is_main or done == 0:
            return
        seconds_left = (now - self.task_began) / done * (total - done)
        self.task = f"{what} {done}/{total}, {duration(seconds_left)} left"
        self.write_status()
        if now - self.task_shown >= (0.5 if self.on_terminal else 60):
            self.task_shown = now
            self.bar.set_postfix_str(self.task) if self.on_terminal else self.show(self.task)

    def micro_step(self, step: int, done: int, total: int) -> None:
        """Show that `done` of a step's `total` micro-steps are done, unless steps are short."""
        if self.step_seconds and self.step_seconds[-1] < 60:  # the bar keeps the last step's values
            return
        self.sign_of_life(f"step {step}: micro-step", done, total)
        elapsed = time.monotonic() - self.task_began
        if done and elapsed > 30:
            self.estimate(elapsed / done * total, self.config.max_steps - step)

    def estimate(self, seconds: float, steps: int) -> None:
        """Print once how long `steps` steps of `seconds` each will take, and what they cost."""
        if self.estimated:
            return
        self.estimated = True
        cost = self.dollars(seconds * steps)
        a_step = duration(seconds) if seconds >= 10 else f"{seconds:.2f} s"
        price = f", ${cost:,.2f}" if cost else ""
        self.print(f"training will take about {duration(seconds * steps)}{price} ({a_step} a step)")

    # ------------------------------------------------------------------ terminal, status.json, tracker

    def print(self, text: str) -> None:
        """Print an event, and keep it for status.json."""
        self.show(text)
        self.events.append([time.time(), text])
        if threading.current_thread() is threading.main_thread():  # two threads would collide
            self.write_status()

    def show(self, text: str) -> None:
        """Print above the bar. The thread that saves does so too: tqdm has a lock."""
        if self.is_main:
            with contextlib.suppress(OSError):  # no reader is no reason to stop
                tqdm.write(text)
                sys.stdout.flush()

    def write_status(self, ended: bool = False) -> None:
        """Write status.json: at most once a second, and when the run has ended. Times are Unix times, the
        rest are seconds, tokens and dollars of all parts of the run."""
        now = time.monotonic()
        if not (self.is_main and self.facts) or (now - self.status_at < 1 and not ended):
            return
        self.status_at = now
        spent, left = self.spent, self.status.get("training_seconds_left")
        status = self.status | {
            "time": time.time(),
            "ended": ended,
            "task": self.task,
            "training_seconds": spent["training"],
            "other_seconds": spent["other"],
            "dollars": spent["dollars"],
            "dollars_left": left and self.dollars(left),
            "events": list(self.events),
        }
        self.run.write_status(status)

    def start_tracker(self) -> None:
        name, run_id = str(self.config.tracker), self.facts["run_id"]  # --resume keeps the id
        self.tracker = importlib.import_module(name)
        options = {"id": run_id} if name == "wandb" else {}
        label = f"{self.config.log_dir.resolve().name}-{run_id}"
        self.tracker.init(project="gpt2", name=label, config=self.facts, resume="allow", **options)

    def track(self, send: Callable[[], object]) -> None:
        """Call `send`, which sends something to the tracker. If it fails, training continues without it."""
        try:
            send()
        except Exception as error:
            self.tracker = None
            self.print(f"--tracker {self.config.tracker} failed, training continues without it: {error}")

    # ------------------------------------------------------------------ the end

    def close(self, text: str) -> None:
        """Close the bar and the tracker, then print `text`."""
        self.bar.close()
        if self.tracker:
            self.track(self.tracker.finish)
        self.print(text)
        self.write_status(ended=True)

    def finish(self, step: int, val_loss: float, score: "Score | None") -> None:
        """Print the results and write them to run.json."""
        self.facts["result"] = result_of(self.facts, step, self.spent, val_loss, score)
        best, loss = self.run.best_checkpoint() if self.is_main else (None, math.nan)
        if best:
            self.facts["result"] |= {"best_checkpoint": best.name, "best_validation_loss": loss}
        self.run.write_facts(self.facts)
        self.run.draw()  # The caption now has the duration.
        if step == self.run.first_step:
            self.run.renew_card(step, {"spent": self.spent})
        where = f"done: {plural(step, 'step')}; the run is in {self.config.log_dir}"
        self.close(f"{where}\n{closing_table(self.facts)}")
