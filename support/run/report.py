"""
What a run reports: a table at the start, lines or a bar during training, a table at the end, and the facts
in run.json. It reports to the terminal, to log.txt, to status.json, and to wandb or trackio.
"""

import contextlib
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
from typing import TYPE_CHECKING, Any

from support.cli import InputError, duration, plural, printable
from support.machine import device as devices
from support.machine.micro_batch import Fit
from support.machine.processes import World
from support.run.curves import (
    GPT2_HELLASWAG,
    GPT2_VAL_LOSS,
    comparable_hellaswag,
    comparable_loss,
    read_status,
)
from support.run.folder import RunFolder, versions

import torch
from tqdm import tqdm

if TYPE_CHECKING:
    from hellaswag import Score
    from train_gpt2 import GPT, TokenLoader, TrainConfig

# Validation losses of a healthy run of the default recipe (build-nanogpt, pull request 30).
HEALTHY_LOSS = {250: 6.16, 1000: 4.15, 1250: 3.95}
TOLERANCE = 0.03  # relative; a loss higher by more than this is not healthy
MANY_EPOCHS = 20
A_LONG_TIME = 48 * 3600  # seconds
EVENTS_KEPT = 200  # in status.json
LITTLE_DATA = 1_000_000  # training tokens; fewer are too few to learn a language
# How values look in log.txt, and what trackers call them; a value of another name keeps it.
FORMATS = {"train": ".6f", "val": ".4f", "hella": ".4f"}
TRACKER_NAMES = {"train": "train/loss", "val": "val/loss", "hella": "hellaswag/acc_norm"}
Facts = dict[str, Any]  # run.json: plain values, all that is needed to understand or repeat the run


# -----------------------------------------------------------------------------
# the facts of a run, and its tables


def facts_of(
    run: RunFolder,
    raw_model: "GPT",
    optimizer: torch.optim.Optimizer,
    fit: Fit,
    val_loader: "TokenLoader",
    n_items: int,
) -> Facts:
    """What run.json records before the first step."""
    config, world, shards, shape = run.config, run.world, val_loader.shards, raw_model.config
    dtype = devices.choose_dtype(config.dtype, world.device, shape.n_embd)
    compiler_fault = f"off: it failed ({fit.compiler_fault})" if fit.compiler_fault else None
    compile_note = compiler_fault or devices.choose_compile(config.compile, world.device)[1]
    grad_accum_steps = config.total_batch_size // (config.sequence_length * fit.rows * world.size)
    return {
        "train_config": asdict(config),
        "model_config": asdict(shape),
        "default_recipe": is_default_recipe(run, raw_model),
        "parameters": count_parameters(raw_model),
        "changed": raw_model.change_from_gpt2(),
        "flops_per_token": shape.flops_per_token(config.sequence_length),
        "val_tokens": val_loader.n_windows * config.sequence_length,
        "hellaswag_items": n_items,
        "encoding": shards.encoding,
        "data": {
            "dataset": shards.source.get("dataset"),
            "config": shards.source.get("config"),
            "fingerprint": shards.fingerprint,
            "train_tokens": shards.count("train"),
            "train_shards": len(shards.files["train"]),
        },
        "device": devices.device_name(world.device),
        "world_size": world.size,
        "optimizer": type(optimizer).__name__,
        "precision": f"{str(dtype).removeprefix('torch.')}, torch.compile {compile_note}",
        "attention": devices.attention_name(world.device, dtype, shape.n_embd // shape.n_head),
        "memory": fit.memory + (", the blocks recomputed" if config.recompute else ""),
        "micro_batch_size": fit.rows,
        "loss_chunks": fit.loss_chunks,
        "grad_accum_steps": grad_accum_steps,
        "warm_up_step_seconds": fit.seconds and fit.seconds * grad_accum_steps,
        "versions": versions(),
        "run_id": run.run_id,
        "interruptions": run.interruptions,
    }


def count_parameters(raw_model: "GPT") -> int:
    """The parameters, without the rows that pad the vocabulary."""
    padding = raw_model.transformer.wte.weight.size(0) - raw_model.config.vocab_size
    return sum(p.numel() for p in raw_model.parameters()) - padding * raw_model.config.n_embd


def is_default_recipe(run: RunFolder, raw_model: "GPT") -> bool:
    """Whether a run's losses compare with published ones, given the same data: only the seed and the order
    of the data may differ."""
    config, shape = run.config, raw_model.config
    values = config.recipe_fields() | asdict(shape)
    defaults = type(config)().recipe_fields() | asdict(type(shape)())
    return all(values[name] == defaults[name] for name in values if name not in ("seed", "shuffle"))


def opening_table(facts: Facts, dollars_so_far: float, first_step: int = 0) -> str:
    """The table at the start: what you want to know before spending 50 hours on a run."""
    config, data, model = facts["train_config"], facts["data"], facts["model_config"]
    tokens = config["max_steps"] * config["total_batch_size"]
    rows = {
        "device": f"{facts['device']}; {plural(facts['world_size'], 'process')}",
        "precision": facts["precision"],
        "attention": facts["attention"],
        "memory": facts["memory"],
        "model": f"{facts['parameters']:,} parameters: {model['n_layer']} layers, {model['n_head']} heads, "
        f"width {model['n_embd']}, block size {model['block_size']}, vocabulary {model['vocab_size']:,} "
        f"({model['encoding']})",
        "data": f"{config['data_dir']}: {data['train_tokens']:,} training tokens, "
        + plural(data["train_shards"], "shard"),
        "recipe": f"{config['recipe']}: {facts['optimizer']}, {config['schedule']}, "
        f"at most {config['max_lr']:.2g}",
        "training": f"{plural(config['max_steps'], 'step')}, {tokens:,} tokens, "
        f"{tokens / data['train_tokens']:.2f} epochs",
        "batch": f"{config['total_batch_size']:,} tokens a step = {plural(facts['micro_batch_size'], 'row')} "
        f"x {config['sequence_length']} tokens x {plural(facts['world_size'], 'process')} x "
        f"{plural(facts['grad_accum_steps'], 'micro-step')}",
        "validation": f"{facts['val_tokens']:,} tokens every {plural(config['val_every'], 'step')}",
        "HellaSwag": f"{facts['hellaswag_items']:,} items every {plural(config['hellaswag_every'], 'step')}",
        "run folder": str(config["log_dir"]),
    }
    if not config["val_every"]:
        rows["validation"] = "off"
    if not facts["hellaswag_items"]:
        rows["HellaSwag"] = "off"
    if facts["warm_up_step_seconds"]:
        left = facts["warm_up_step_seconds"] * (config["max_steps"] - first_step)
        rows["time"] = f"about {duration(left)} of training, plus evaluation (estimated from the warm-up)"
        if left > A_LONG_TIME and facts["device"].startswith("cpu"):
            rows["time"] += "; on a CPU, try --demo"
    if facts["changed"]:
        rows["export"] = (
            f"not a GPT-2: {facts['changed']}. GPT-2's format has no place for it: checkpoints resume here, "
            "and sample.py reads them; transformers and llama.cpp don't"
        )
    if price := config["dollars_per_hour"]:
        rows["cost"] = f"${price:,.2f} an hour, ${dollars_so_far:,.2f} so far"
    warm_up, falls_from = config["warmup_steps"], round((1 - config["cooldown"]) * config["max_steps"])
    if config["schedule"] == "trapezoid" and warm_up > falls_from and config["max_steps"] > 0:
        rows["note"] = (
            f"the learning rate never reaches --max_lr: the warm-up takes {warm_up} steps, the cooldown "
            f"begins at step {falls_from}; see --warmup_steps"
        )
    elif warm_up >= config["max_steps"] > 0:
        rows["note"] = (
            f"the learning rate still rises when the run ends: the warm-up takes {warm_up} steps; see "
            "--warmup_steps"
        )
    elif tokens > MANY_EPOCHS * data["train_tokens"]:
        rows["note"] = f"more than {MANY_EPOCHS} epochs: the model may memorize the text; lower --max_steps"
    elif data["train_tokens"] < LITTLE_DATA:
        rows["note"] = f"less than {LITTLE_DATA:,} tokens: too little to learn a language from"
    lines = [f"{name + ':':12} {value}" for name, value in rows.items()]
    if sys.stdout.isatty():
        width = max(60, shutil.get_terminal_size().columns - 1)
        wrapper = textwrap.TextWrapper(width, subsequent_indent=13 * " ", break_on_hyphens=False)
        lines = [wrapper.fill(line) for line in lines]
    return "\n".join(lines)


def tensor_table(tensors: dict[str, torch.Tensor]) -> str:
    """A table of a model's state dictionary: names, shapes, numbers of elements."""
    rows = [f"{name:36} {list(t.shape)!s:16} {t.numel():>12,}" for name, t in tensors.items()]
    total = sum(t.numel() for name, t in tensors.items() if name != "lm_head.weight")
    return "\n".join([*rows, f"{total:,} parameters; lm_head.weight is transformer.wte.weight"])


def check_tracker(name: str | None) -> None:
    """Raises InputError unless the tracker of this name is installed."""
    if name is not None and importlib.util.find_spec(name) is None:
        raise InputError(f"--tracker {name}: it is not installed; pip install {name}")


class Report:
    """Reports for the main process, and keeps time. A terminal shows one bar, with events above it;
    elsewhere, the tutorial's lines appear, at most one per second. Values also go to log.txt and to the
    tracker, if there is one; events and the last values go to status.json, for `plot.py watch`."""

    def __init__(self, config: "TrainConfig", world: World):
        self.config, self.is_main, self.world_size = config, world.is_main, world.size
        self.on_terminal = sys.stderr.isatty()
        self.peak = devices.peak_flops(
            devices.device_name(world.device)
        )  # FLOP/s of each device; None if unknown
        self.last_line = -math.inf
        self.step_seconds: deque[float] = deque(maxlen=20)  # of the last steps
        self.n_steps = 0  # trained by this process
        self.warned = self.estimated = False
        self.task_began = self.task_shown = 0.0  # when the current long task began, and was last shown
        self.task = ""  # the long task, and how far it is
        self.events: deque[list[Any]] = deque(maxlen=EVENTS_KEPT)  # [Unix time, text], the oldest first
        self.status: dict[str, Any] = {"values": {}}  # what steps and evaluations add to status.json
        self.status_at = -math.inf  # when it was last written
        world.from_main(lambda: check_tracker(config.tracker))
        self.run: RunFolder  # see `start`
        self.tracker: Any = None  # the module wandb or trackio; the calls used here work in both
        self.facts: Facts = {}
        self.started = time.perf_counter()
        self.training_seconds = 0.0  # by this process
        self.before = {"training": 0.0, "other": 0.0, "tokens": 0}  # before the interruption

    @property
    def spent(self) -> dict[str, float]:
        """Seconds of training, seconds of everything else, and tokens trained on, in all parts of the run."""
        other = time.perf_counter() - self.started - self.training_seconds
        return {
            "training": self.before["training"] + self.training_seconds,
            "other": self.before["other"] + other,
            "tokens": self.before["tokens"] + self.n_steps * self.config.total_batch_size,
        }

    def start(
        self,
        run: RunFolder,
        raw_model: "GPT",
        optimizer: torch.optim.Optimizer,
        fit: Fit,
        val_loader: "TokenLoader",
        *,
        n_items: int,
    ) -> None:
        """Print the table, write run.json, and set up the tracker and the bar. `n_items`: HellaSwag's."""
        self.begin(run, facts_of(run, raw_model, optimizer, fit, val_loader, n_items=n_items))

    def begin(self, run: RunFolder, facts: Facts) -> None:
        """`start`, once the facts are known."""
        self.run, self.facts = run, facts
        run.write_facts(facts)
        self.before |= run.trainer.get("spent", {})  # from the checkpoint, if resumed
        if run.interruptions:  # the events of the parts before stay, also those of steps that run again
            before = read_status(run.path)
            self.events = deque([*before.get("events", []), *self.events], maxlen=EVENTS_KEPT)
            self.status |= {name: before[name] for name in ("samples", "samples_step") if name in before}
        if facts["precision"].startswith("float32"):
            self.peak = None  # the table's peaks are for 16-bit types
        hours = (self.spent["training"] + self.spent["other"]) / 3600
        self.show(opening_table(facts, hours * (self.config.dollars_per_hour or 0), run.first_step))
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

    def log(self, step: int, **values: float) -> None:
        """Log values of `step` under their names: to log.txt, status.json and the tracker. The pictures draw
        them, and --resume keeps them. Any name will do."""
        self.write_values(step, values)
        self.send_to_tracker(step, values)

    def write_values(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.run.append(step, name, format(value, FORMATS.get(name, ".6g")))
            self.status["values"][name] = [step, value if math.isfinite(value) else None]
        self.write_status()

    def step(self, step: int, loss: float, lr: float, norm: float, seconds: float) -> None:
        """Report one training step: its loss in nats, its duration in seconds."""
        self.n_steps += 1
        self.training_seconds += seconds
        self.step_seconds.append(seconds)
        if not self.is_main:
            return
        rate = self.config.total_batch_size / seconds
        mfu = rate * self.facts["flops_per_token"] / (self.peak * self.world_size) if self.peak else None
        typical = statistics.median(self.step_seconds)
        left = self.config.max_steps - step - 1
        self.task = ""
        self.status |= {
            "tokens_per_second": self.config.total_batch_size / typical,
            "mfu": mfu,
            "step_seconds": typical,
            "training_seconds_left": left * typical,
        }
        self.write_values(step, {"train": loss})
        if self.on_terminal:
            self.update_bar(step, loss, lr, norm, rate=rate, mfu=mfu)
        elif time.monotonic() - self.last_line >= 1:
            self.last_line = time.monotonic()
            self.show(
                f"step {step:5d} | loss: {loss:.6f} | lr {lr:.4e} | norm: {norm:.4f} | "
                f"dt: {1000 * seconds:.2f}ms | tok/sec: {rate:.2f}" + (f" | mfu: {mfu:.1%}" if mfu else "")
            )
        values = {"train": loss, "train/lr": lr, "train/norm": norm, "tokens_per_second": rate}
        self.send_to_tracker(step, values | ({"mfu": mfu} if mfu else {}))
        if (self.n_steps == 5 or seconds > 30) and not self.estimated:  # the first is slow: it allocates
            self.estimate(min(self.step_seconds), left)

    def update_bar(
        self, step: int, loss: float, lr: float, norm: float, *, rate: float, mfu: float | None
    ) -> None:
        typical, left = self.status["step_seconds"], self.config.max_steps - step - 1
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

    def validation(self, step: int, loss: float) -> None:
        """Report a validation loss, in nats per token."""
        self.evaluated(step, f"validation loss {loss:.4f} on {self.facts['val_tokens']:,} tokens", val=loss)
        warning = unhealthy(self.facts, step, loss)
        if warning and not self.warned:
            self.warned = True
            self.print(warning)

    def hellaswag(self, step: int, score: "Score") -> None:
        self.evaluated(step, f"HellaSwag {score}", hella=score.acc_norm)

    def evaluated(self, step: int, text: str, **values: float) -> None:
        """Report the end of an evaluation: print `text`, and log the values."""
        self.task = ""
        self.bar.set_postfix_str("", refresh=False)  # clear what `sign_of_life` left
        self.print(f"step {step}: {text}")
        self.log(step, **values)

    def samples(self, step: int, texts: list[str]) -> None:
        """Print texts sampled at `step`; the model card shows the latest."""
        self.run.samples = (step, texts)
        self.status |= {"samples": [printable(text) for text in texts], "samples_step": step}
        for text in texts:
            self.show(f"step {step}: sample: {printable(text)}")
        self.write_status()

    # ------------------------------------------------------------------ long tasks

    def progress_of(self, what: str) -> Callable[[int, int], None]:
        """A callback (parts done, parts in all) that shows the progress of a long task."""
        return lambda done, total: self.sign_of_life(what, done, total)

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
        if self.step_seconds and self.step_seconds[-1] < 60:  # then keep the last step's values in the bar
            return
        self.sign_of_life(f"step {step}: micro-step", done, total)
        elapsed = time.monotonic() - self.task_began
        if done and elapsed > 30 and not self.estimated:
            self.estimate(elapsed / done * total, self.config.max_steps - step)

    def estimate(self, seconds: float, steps: int) -> None:
        """Print once how long `steps` steps of `seconds` each will take, and what they cost."""
        self.estimated = True
        cost = (self.config.dollars_per_hour or 0) * seconds * steps / 3600
        a_step = duration(seconds) if seconds >= 10 else f"{seconds:.2f} s"
        price = f", ${cost:,.2f}" if cost else ""
        self.print(f"training will take about {duration(seconds * steps)}{price} ({a_step} a step)")

    # ------------------------------------------------------------------ terminal, status.json, tracker

    def print(self, text: str) -> None:
        """Print an event, and keep it for status.json."""
        self.show(text)
        self.events.append([time.time(), text])
        if threading.current_thread() is threading.main_thread():  # not the one that saves: two would collide
            self.write_status()

    def show(self, text: str) -> None:
        """Print above the bar. The thread that saves does so too: tqdm has a lock."""
        if self.is_main:
            with contextlib.suppress(OSError):  # nobody reads it any more: no reason to stop
                tqdm.write(text)
                sys.stdout.flush()

    def write_status(self, ended: bool = False) -> None:
        """Write status.json: at most once a second, and when the run has ended. Times are Unix times, the
        rest are seconds, tokens and dollars of all parts of the run."""
        now = time.monotonic()
        if not (self.is_main and self.facts) or (now - self.status_at < 1 and not ended):
            return
        self.status_at = now
        spent, price = self.spent, self.config.dollars_per_hour
        left = self.status.get("training_seconds_left")
        status = self.status | {
            "time": time.time(),
            "ended": ended,
            "task": self.task,
            "training_seconds": spent["training"],
            "other_seconds": spent["other"],
            "dollars": price and price * (spent["training"] + spent["other"]) / 3600,
            "dollars_left": price and left and price * left / 3600,
            "events": list(self.events),
        }
        self.run.write_status(status)

    def start_tracker(self) -> None:
        name, run_id = self.config.tracker, self.facts["run_id"]  # the same id after --resume
        assert name is not None
        self.tracker = importlib.import_module(name)
        options = {"id": run_id} if name == "wandb" else {}
        label = f"{self.config.log_dir.resolve().name}-{run_id}"
        self.tracker.init(project="gpt2", name=label, config=self.facts, resume="allow", **options)

    def send_to_tracker(self, step: int, values: dict[str, float]) -> None:
        if self.tracker:
            named = {TRACKER_NAMES.get(name, name): value for name, value in values.items()}
            self.track(lambda: self.tracker.log(named, step=step))

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
        self.run.write_facts(self.facts)
        self.run.draw()  # with the time in its caption
        where = f"done: {plural(step, 'step')}; the run is in {self.config.log_dir}"
        self.close(f"{where}\n{closing_table(self.facts)}")


def unhealthy(facts: Facts, step: int, val_loss: float) -> str | None:
    """A warning if the validation loss of a default-recipe run is too high; None if it is healthy or no
    published value exists for this step."""
    if step not in HEALTHY_LOSS or not (facts["default_recipe"] and comparable_loss(facts)):
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
    facts: Facts, step: int, spent: dict[str, float], val_loss: float, score: "Score | None"
) -> dict[str, Any]:
    """The results in run.json: losses in nats, times in hours."""
    config = facts["train_config"]
    tokens, hours = step * config["total_batch_size"], (spent["training"] + spent["other"]) / 3600
    scores = score and {
        "acc": score.acc,
        "acc_norm": score.acc_norm,
        "items": score.n,
        "standard_error": score.standard_error(score.acc_norm),
    }
    return {
        "validation_loss": None if math.isnan(val_loss) else round(val_loss, 4),
        "hellaswag": scores,
        "tokens": tokens,
        "training_hours": spent["training"] / 3600,
        "other_hours": spent["other"] / 3600,
        "tokens_per_second": spent["tokens"] / spent["training"] if spent["training"] else None,
        "dollars": config["dollars_per_hour"] and config["dollars_per_hour"] * hours,
        "interruptions": facts["interruptions"],
    }


def closing_table(facts: Facts) -> str:
    """The table at the end, with published figures where the comparison is fair."""
    config, result = facts["train_config"], facts["result"]
    rows, default = [], facts["default_recipe"] and comparable_loss(facts)
    if result["validation_loss"] is not None:
        fair = f"OpenAI's GPT-2 {GPT2_VAL_LOSS}" + (", healthy runs 3.02 to 3.09" if default else "")
        value = f"{result['validation_loss']:.4f}"
        rows.append(("validation loss", value, fair if comparable_loss(facts) else ""))
    if score := result["hellaswag"]:
        fair = f"OpenAI's GPT-2 {GPT2_HELLASWAG}" + (", healthy runs .300 to .313" if default else "")
        value = f"{score['acc_norm']:.4f} +- {score['standard_error']:.4f} on {score['items']:,} items"
        rows.append(("HellaSwag", value, fair if comparable_hellaswag(facts) else ""))
    training, other = duration(3600 * result["training_hours"]), duration(3600 * result["other_hours"])
    rows.append(("tokens", f"{result['tokens']:,}", ""))
    rows.append(("time", f"{training} of training, {other} of evaluation, saving and start-up", ""))
    if result["tokens_per_second"]:
        rows.append(("speed", f"{result['tokens_per_second']:,.0f} tokens/s, the mean of all steps", ""))
    if result["dollars"] is not None:
        rows.append(("cost", f"${result['dollars']:,.2f}", ""))
    rows.append(("interruptions", str(result["interruptions"]), ""))
    table = [f"{name + ':':17}{value}" + (f" ({fair})" if fair else "") for name, value, fair in rows]
    folder = shlex.quote(str(config["log_dir"]))
    next_steps = [f"python sample.py --model {folder}"] if config["checkpoint_every"] else []
    next_steps.append(f"python plot.py run {folder}")
    return "\n".join([*table, f"next:            {'; '.join(next_steps)}"])
