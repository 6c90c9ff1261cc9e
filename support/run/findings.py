"""What `train_gpt2.py --check` has found: warnings, and a table with the speed, the hours, the cost."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from support.cli import InputError, duration, file_size, plural
from support.machine.device import card_name, peak_flops
from support.machine.processes import World
from support.model.huggingface import list_checkpoints
from support.run import curves
from support.run.curves import read_log, read_run, read_status
from support.run.folder import SAVE_AT_LEAST_EVERY, RunFolder
from support.run.report import A_LONG_TIME, note_on, table

if TYPE_CHECKING:
    from train_gpt2 import TrainConfig

NOTES = r"training without HellaSwag: |note: \S"  # lines of a run that are warnings
FIRST_LOSS = 0.05  # The loss before training differs from the expected one by at most this share.
FAR_BELOW = 0.6  # of what others report
LINKS_SHARE = 0.2  # of a step, for its all-reduce
USED_SHARE = 0.1  # of a GPU's memory, before a run begins: a context and NCCL take less
ONE_EPOCH = 1.1  # at most, after rounding

# What others report for GPT-2 (124M) with sequences of 1,024 tokens: tokens/s of one card, and who.
REPORTED = {
    "H200": (488_000, "modded-nanogpt's simple script, another block"),
    "H100": (468_000, "llm.c, 8 cards"),
    "A100": (182_000, "build-nanogpt's video, compiled"),
    "RTX 4090": (105_000, "nanoGPT"),
    "RTX 4070 SUPER": (56_000, "a fork of build-nanogpt, from its 50 hours"),
}


class Findings:
    """What the phases of a check have left behind, and what follows for the run."""

    def __init__(
        self,
        config: "TrainConfig",
        folder: Path,
        lines: list[str],
        get_lr: Callable[[int, "TrainConfig"], float],
    ):
        """`config`, `get_lr`: of the run that is checked. `folder`, `lines`: of the steps that were tried,
        and what was printed meanwhile."""
        machine = json.loads((folder / "machine.json").read_text(encoding="utf-8"))
        facts, status = read_run(folder), read_status(folder)
        self.config, self.machine, self.facts, self.lines = config, machine, facts, lines
        self.size: int = facts["world_size"]
        self.checkpoint_bytes = sum(file.stat().st_size for file in list_checkpoints(folder)[-1].iterdir())
        self.first_loss = dict(read_log(folder / "log.txt")["val"]).get(0, math.nan)  # in nats
        # The loss of a uniform guess, and of a model's guess before training: its logits have a variance of
        # 0.02² n_embd, since the norm before them gives vectors of length √n_embd.
        self.uniform = math.log(facts["model_config"]["vocab_size"])
        self.untrained = self.uniform + 0.02**2 * facts["model_config"]["n_embd"] / 2
        self.on_cpu = facts["device"].startswith("cpu")
        self.step_seconds: float = status["step_seconds"]
        saves = [re.search(r": saved .* in ([\d.]+) s$", text) for _, text in status["events"]]
        self.save_seconds = max((float(found[1]) for found in saves if found), default=0.0)
        self.rate = config.total_batch_size / self.step_seconds  # tokens/s of all devices
        peak = None if facts["precision"].startswith("float32") else peak_flops(facts["device"])
        self.mfu = peak and self.rate * facts["flops_per_token"] / (peak * self.size)
        # The run, or what is left of it.
        self.of_the_folder: list[str] = []
        self.refusals: list[str] = []  # why --resume will not continue it
        run = RunFolder(config, World(), self.of_the_folder.append)
        run.get_lr, run.recipe = get_lr, facts["recipe"] | config.recipe_fields()
        run.defaults = facts["recipe"] | type(config)().recipe_fields()
        try:
            run.look(lock=False)
        except InputError as error:  # the run will end with it, unless --resume is still to come
            (self.refusals if config.resume else self.of_the_folder).append(str(error))
        steps_left = max(0, config.max_steps - run.trainer.get("step", 0))
        self.training_seconds = steps_left * self.step_seconds
        self.epochs = curves.epochs(facts, config.max_steps * config.total_batch_size)
        more = self.most_checkpoints() - len(list_checkpoints(config.log_dir))
        self.disk_needed = max(0, more) * self.checkpoint_bytes
        # An all-reduce of the gradients, in float32.
        moved = 2 * (self.size - 1) / self.size * 4 * facts["parameters"]
        self.links_seconds = moved / machine["links"] if machine["links"] else 0.0

    def most_checkpoints(self) -> int:
        """How many a run has at once: the last two, the best, the one being written, those kept for good."""
        config = self.config
        if not config.checkpoint_every:
            return 0
        kept = 4 + (config.max_steps // config.keep_every if config.keep_every else 0)
        saves = math.ceil(config.max_steps / config.checkpoint_every)
        return min(kept, saves + int(self.training_seconds // SAVE_AT_LEAST_EVERY))

    def reported(self) -> tuple[float, str] | None:
        """The tokens/s that others report for so many of these cards, and who; None for another model, or
        another way to compute it."""
        model, card = self.facts["model_config"], card_name(self.facts["device"])
        gpt2 = (model["n_layer"], model["n_embd"], self.config.sequence_length) == (12, 768, 1024)
        fast = self.facts["precision"] == "bfloat16, torch.compile on" and not self.config.recompute
        if card not in REPORTED or not gpt2 or not fast:
            return None
        rate, source = REPORTED[card]
        return rate * self.size, source

    # ------------------------------------------------------------------ warnings

    def warnings(self) -> list[str]:
        """What the machine survives, but nobody wants."""
        found = [line for line in self.lines if re.match(NOTES, line)]
        found += [*self.of_the_machine(), *self.of_the_speed(), *self.of_the_run()]
        return list(dict.fromkeys(found))

    def of_the_machine(self) -> list[str]:
        config, processes, free = self.config, self.machine["processes"], self.machine["disk_free"]
        found = []
        if len(names := sorted({process["device"] for process in processes})) > 1:
            found.append(f"the devices differ, and the slowest sets the pace: {', '.join(names)}")
        if (idle := max(process.get("idle", 0) for process in processes)) > 0:
            found.append(f"{plural(idle, 'GPU')} would be idle: see --nproc_per_node")
        if used := [p for p in processes if p.get("used", 0) > USED_SHARE * p.get("memory", 0)]:
            found.append(f"other programs use {file_size(used[0]['used'])} of a GPU: see nvidia-smi")
        if self.disk_needed > free:
            found.append(
                f"the checkpoints need up to {file_size(self.disk_needed)}, the disk of {config.log_dir} has "
                f"{file_size(free)} free: choose another --log_dir, or a larger --keep_every"
            )
        memory, copy = processes[0]["host_memory"], 2 * self.checkpoint_bytes
        if memory and memory < copy and config.checkpoint_every and not config.shard:
            found.append(
                f"training will wait for every checkpoint: {file_size(memory)} of host memory is free, "
                f"{file_size(copy)} are needed for a copy"
            )
        return found

    def of_the_speed(self) -> list[str]:
        found = []
        reason = self.facts["precision"].partition(", torch.compile off: ")[2]
        if reason and not self.on_cpu:
            found.append(f"training without torch.compile, which is slower: {reason}")
        if self.on_cpu and self.training_seconds > A_LONG_TIME:
            found.append(
                "this run would train on the CPU; --device cuda insists on a GPU, and says what is missing"
            )
        reported = self.reported()
        if reported and self.rate < FAR_BELOW * reported[0]:
            found.append(
                f"{self.rate:,.0f} tokens/s are far below the {reported[0]:,} of others ({reported[1]}): "
                "look in nvidia-smi for other programs, a low clock, a power limit"
            )
        if self.links_seconds > LINKS_SHARE * self.step_seconds:
            found.append(
                f"slow links: exchanging gradients takes {self.links_seconds:.2f} s, a step "
                f"{self.step_seconds:.2f} s; fewer cards, or cards with NVLink, may cost less"
            )
        return found

    def of_the_run(self) -> list[str]:
        config, facts = self.config, self.facts
        found = [*self.of_the_folder]
        off = abs(self.first_loss - self.untrained)
        if not config.init_from and not off <= FIRST_LOSS * self.untrained:
            found.append(
                f"the loss before training is {self.first_loss:.2f}; a model that knows nothing has about "
                f"{self.untrained:.2f}: the device may compute wrongly"
            )
        if note := note_on(config, facts):
            found.append(note)
        elif self.epochs > ONE_EPOCH:
            found.append(
                f"the run reads its data {self.epochs:.1f} times: prepare more, or lower --max_steps"
            )
        return found

    # ------------------------------------------------------------------ the table

    def table(self, resumed: str) -> str:
        """What works, how fast, for how long, at which price. `resumed`: how the resumed step compares."""
        config, facts, machine, process = self.config, self.facts, self.machine, self.machine["processes"][0]
        cost, reported = self.dollars(self.training_seconds), self.reported()
        save = "" if config.checkpoint_every else "; but --checkpoint_every 0 saves none"
        host = f"; of the host, {file_size(process['host_memory'])} free" if process["host_memory"] else ""
        driver = f"driver {process['driver']}, " if "driver" in process else ""
        rows: dict[str, str | None] = {
            "device": f"{facts['device']}; {plural(self.size, 'process')}",
            "software": f"{driver}PyTorch {facts['versions']['torch']}, Python {facts['versions']['python']}",
            "links": machine["links"]
            and f"{machine['links'] / 1e9:.1f} GB/s (bus bandwidth of an all-reduce): "
            f"{1000 * self.links_seconds:.1f} ms for a step's gradients",
            "memory": facts["memory"] + host,
            "precision": facts["precision"],
            "attention": facts["attention"],
            "batch": f"{plural(facts['micro_batch_size'], 'row')} x {config.sequence_length} tokens x "
            f"{plural(self.size, 'process')} x {plural(facts['grad_accum_steps'], 'micro-step')}",
            "data": f"{plural(facts['data']['train_shards'], 'shard')}, {facts['data']['train_tokens']:,} "
            f"training tokens, {self.epochs:.2f} epochs{', all checksums right' * config.verify}",
            "first loss": f"{self.first_loss:.2f}; {self.uniform:.2f} for a uniform guess",
            "HellaSwag": f"{plural(facts['hellaswag_items'], 'item')} scored"
            if facts["hellaswag_items"]
            else "off",
            "samples": "written" if config.sample_every else "off",
            "checkpoint": f"{file_size(self.checkpoint_bytes)}, saved in {self.save_seconds:.1f} s, read "
            f"back, resumed: {resumed}{save}",
            "disk": f"{file_size(machine['disk_speed'])}/s written, {file_size(machine['disk_free'])} free, "
            f"up to {file_size(self.disk_needed)} needed",
            "speed": f"{self.rate:,.0f} tokens/s" + (f", MFU {self.mfu:.0%}" if self.mfu else ""),
            "others": reported and f"{reported[0]:,} tokens/s ({reported[1]})",
            "time": f"about {duration(self.training_seconds)} of training, plus evaluation",
            "cost": None if cost is None else f"about ${cost:,.2f} of training, plus evaluation",
            "power cut": f"loses {self.most_lost()} at the worst moment",
        }
        return table(rows, 13)

    def dollars(self, seconds: float) -> float | None:
        price = self.config.dollars_per_hour
        return None if price is None else price * seconds / 3600

    def most_lost(self) -> str:
        """The work since the last checkpoint, just before the next one is complete; in words."""
        config = self.config
        if not config.checkpoint_every:
            return "the whole run"
        steps = min(config.checkpoint_every, config.max_steps)
        seconds = min(steps * self.step_seconds, SAVE_AT_LEAST_EVERY) + self.save_seconds
        cost = self.dollars(seconds)
        return duration(seconds) + ("" if cost is None else f" (${cost:,.2f})")
