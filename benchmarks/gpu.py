"""
Everything that wants measuring on an NVIDIA GPU, in one command. It needs no network, and it may be stopped:
called again, it goes on with what is missing.

    python -m benchmarks.gpu --data_dir edu_trial --hellaswag_data hellaswag_val.jsonl
    python -m benchmarks.gpu --parts b --minutes_per_part 20          # one part, and more time for it
    python -m benchmarks.gpu --rows benchmarks/results/nvidia_h200.json    # only print what was measured

    a   the tests that need a GPU
    b   training the 124M model: tokens/s, MFU and memory of every micro-batch that fits, compiled and not;
        the loss in chunks, blocks recomputed, fewer activations kept; the tutorial's way and transformers
    c   sampling, beside transformers; HellaSwag, beside one item at a time
    d   train_gpt2.py itself, on the shards in --data_dir, for the time that is left

Each measurement of b and c has a process of its own, so that it finds the GPU's memory empty. After each, all
figures so far are written to <out>/<device>.json; part d leaves its log and its picture beside them. What
fails (out of memory, a compiler's fault) is written down as failed, and the rest goes on. --tiny is the same
on a CPU, in miniature: its figures mean nothing.
"""

import contextlib
import importlib.metadata
import json
import math
import multiprocessing
import os
import platform
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from benchmarks import hellaswag, sampling, training
from support.cli import InputError, plural, run_command
from support.files import to_json, write_file
from support.machine.device import GB, choose_device, choose_dtype, device_name, is_out_of_memory
from support.machine.micro_batch import LOSS_CHUNKS
from support.run.curves import read_log
from support.run.folder import versions
from train_gpt2 import TrainConfig

import torch

ROOT = Path(__file__).parent.parent
LONGEST = 400  # seconds; a measurement of part b or c without a result by then has failed
START_UP = 120  # seconds of part d that its steps don't get: compilation, validation, saving
TO_SAVE = 40  # seconds between part d's SIGTERM and the end
LEAST_STEPS = 40.0  # seconds that part d's steps get at least


@dataclass(frozen=True)
class Config:
    """Measure everything on a GPU."""

    parts: tuple[Literal["a", "b", "c", "d"], ...] = ("a", "b", "c", "d")
    minutes_per_part: float = 9.0  # at most
    minutes: float = 30.0  # at most, all parts together
    only: str = ""  # nothing but the measurements whose names contain this
    retry: bool = False  # measure again what failed
    data_dir: Path | None = None  # token shards; without them part d is skipped
    hellaswag_data: Path | None = None  # items as JSON lines; without them HellaSwag is skipped
    out: Path = ROOT / "benchmarks/results"  # the folder of <device>.json
    device: Literal["cuda", "cpu"] = "cuda"
    tiny: bool = False  # sizes for a CPU, in seconds
    rows: Path | None = None  # print the tables of this <device>.json, and measure nothing


@dataclass(frozen=True)
class Scale:
    """The sizes of everything."""

    n_layer: int
    n_embd: int
    sequence_length: int
    total_batch_size: int  # tokens of a step
    rows: tuple[int, ...]  # of a micro-batch, largest first
    compared: int  # rows at which chunks, recomputation and budgets are compared, if they fit
    n: int  # steps, or rounds, of a measurement
    seconds: float  # of the steps of one measurement, about
    items: int  # of HellaSwag in a round
    new_tokens: int  # of a sample
    backend: str  # of torch.compile


FULL = Scale(12, 768, 1024, 2**19, (64, 32, 16, 8, 4, 2, 1), 32, 10, 8.0, 500, 200, "inductor")
# Inductor would compile C++ for half a minute; this backend does all else.
TINY = Scale(2, 64, 64, 256, (2, 1), 2, 3, 0.1, 4, 5, "aot_eager_decomp_partition")
CHANGES: list[dict[str, Any]] = [
    {"loss_chunks": LOSS_CHUNKS}, {"memory_budget": 0.9}, {"memory_budget": 0.5}, {"recompute": True},
]  # fmt: skip
MOST_MICRO_STEPS = 64  # a step of few rows has no more, for time; AdamW then takes more of it than it would


class Measurement(NamedTuple):
    """One entry of the results: what `function(**arguments)` returns."""

    name: str
    function: Callable[..., dict[str, Any]]
    arguments: dict[str, Any]


Done = dict[str, dict[str, Any]]  # the results of a part, by measurement; a failure has the key "error"


# -----------------------------------------------------------------------------
# what there is to measure; a plan grows with its results, since they say what fits


def plan_training(done: Done, scale: Scale, config: Config) -> Iterator[Measurement]:
    """The measurements of part b, the most important first. It ends early where the next ones depend on a
    result that is missing."""

    def way(name: str, rows: int, **changes: Any) -> Measurement:
        micro_steps = scale.total_batch_size // (rows * scale.sequence_length)
        settings = training.Config(
            n=scale.n, n_layer=scale.n_layer, n_embd=scale.n_embd, batch_size=rows,
            micro_steps=min(MOST_MICRO_STEPS, micro_steps), sequence_length=scale.sequence_length,
            device=config.device, backend=scale.backend, **changes,
        )  # fmt: skip
        title = ", ".join([f"{name}, {plural(rows, 'row')}", *(f"{k} {v}" for k, v in changes.items())])
        arguments = {"way": name, "config": settings, "seconds": scale.seconds}
        return Measurement(title, training.measure, arguments)

    yield way("matmul", max(scale.rows))
    sizes = list(scale.rows)
    for name in ("ours compiled", "tutorial compiled", "transformers compiled", "tutorial"):
        for rows in sizes:  # from the largest down to what fits
            yield (one := way(name, rows))
            if one.name not in done:
                return
            if "out of memory" not in done[one.name].get("error", ""):
                yield way("ours compiled", rows)  # to compare with
                break
        if name == "ours compiled":
            sizes = [size for size in sizes if size <= rows]
    compared = min(sizes[0], scale.compared)
    yield way("ours compiled", compared)
    for changes in CHANGES:
        yield way("ours compiled", compared, **changes)
    for name in ("ours compiled", "ours"):
        for rows in sizes:
            yield way(name, rows)


def plan_scoring(scale: Scale, config: Config, dtype: str) -> Iterator[Measurement]:
    sizes = {"n_layer": scale.n_layer, "n_embd": scale.n_embd, "device": config.device, "dtype": dtype}
    settings = sampling.Config(n=min(scale.n, 5), new_tokens=scale.new_tokens, **sizes)
    yield Measurement("sampling", sampling.measure, {"config": settings})
    if not missing_input("HellaSwag", config):
        scoring = hellaswag.Config(data=config.hellaswag_data, n=3, limit=scale.items, all=True, **sizes)
        yield Measurement("HellaSwag", hellaswag.measure, {"config": scoring})


def plan_run(record: dict[str, Any], scale: Scale, config: Config) -> Iterator[Measurement]:
    if not missing_input("train_gpt2.py", config):
        rates = [
            result["tokens_per_second"]
            for result in record["parts"].get("b", {}).values()
            if result.get("way") == "ours compiled" and result["rows"] == max_rows(record)
        ]
        arguments = {"config": config, "scale": scale, "rate": max(rates, default=None),
                     "beside": result_file(record, config)}  # fmt: skip
        yield Measurement("train_gpt2.py", run_training, arguments)


def max_rows(record: dict[str, Any]) -> int:
    """The largest micro-batch that fitted, in rows; 0 if none was measured."""
    results = record["parts"].get("b", {}).values()
    return max(
        (r["rows"] for r in results if r.get("way") == "ours compiled" and "error" not in r), default=0
    )


def plan(part: str, record: dict[str, Any], scale: Scale, config: Config) -> list[Measurement]:
    """What is missing in a part's results, each once."""
    done = record["parts"].setdefault(part, {})
    wanted = {
        "a": lambda: iter([Measurement("tests marked cuda", run_tests, {})]),
        "b": lambda: plan_training(done, scale, config),
        "c": lambda: plan_scoring(scale, config, record["facts"]["dtype"]),
        "d": lambda: plan_run(record, scale, config),
    }[part]()
    return list({one.name: one for one in wanted if one.name not in done}.values())


NEEDS = {"HellaSwag": "hellaswag_data", "train_gpt2.py": "data_dir"}  # the flag of a measurement's input


def missing_input(name: str, config: Config) -> str | None:
    """Why the measurement of this name can't be made; None if it can."""
    path = getattr(config, NEEDS[name])
    if path is None:
        return f"--{NEEDS[name]} is not given"
    return None if path.exists() else f"--{NEEDS[name]} {path} does not exist"


# -----------------------------------------------------------------------------
# measuring


def gather_facts(device: str, n_embd: int) -> dict[str, Any]:
    """What the figures were measured with. In a process of its own: a look at a GPU takes some of it."""
    chosen = choose_device(device)
    on_gpu = chosen.type == "cuda"
    return {
        "device": device_name(chosen),
        "memory": torch.cuda.get_device_properties(chosen).total_memory if on_gpu else None,
        "compute_capability": torch.cuda.get_device_capability(chosen) if on_gpu else None,
        "dtype": str(choose_dtype("auto", chosen, n_embd)).removeprefix("torch."),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if on_gpu else None,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "transformers": importlib.metadata.version("transformers"),
        **versions(),
    }


def in_a_process(function: Callable[..., dict[str, Any]], arguments: dict[str, Any], seconds: float) -> Any:
    """What the function returns in a fresh process: a result, a failure with the key "error", or None if it
    takes longer than `seconds`."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=send_result, args=(there, function, arguments), daemon=True)
    process.start()
    there.close()
    try:
        if not here.poll(seconds):
            return None
        result = here.recv()
        process.join(10)
        return result
    except EOFError:  # it died: the system's memory ran out, a fault in a library
        process.join()
        return {"error": f"the process ended with exit status {process.exitcode}"}
    finally:
        process.kill()
        process.join()


def send_result(pipe: Any, function: Callable[..., dict[str, Any]], arguments: dict[str, Any]) -> None:
    try:
        result = function(**arguments)
    except Exception as error:
        first_line = (str(error).splitlines() or [""])[0][:300]
        kind = "out of memory" if is_out_of_memory(error) else type(error).__name__
        result = {"error": f"{kind}: {first_line}", "traceback": traceback.format_exc()[-4000:]}
    if torch.cuda.is_initialized():
        result["max_memory_allocated"] = torch.cuda.max_memory_allocated()
        result["max_memory_reserved"] = torch.cuda.max_memory_reserved()
    pipe.send(result)


def run_program(command: list[str], output: Path, seconds: float, to_save: float = 0.0) -> tuple[int, str]:
    """Run a program from the project's folder, what it prints going to a file, for at most `seconds`; then
    it gets SIGTERM, and `to_save` seconds later it is killed, with all that it started. Returns its exit
    status (negative: the signal that ended it) and what it printed."""
    with open(output, "w", encoding="utf-8") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(to_save)
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)  # what it started, too
            process.wait()
    return process.returncode, output.read_text(encoding="utf-8", errors="replace")


def tail(text: str, lines: int = 40) -> list[str]:
    return text.replace("\r", "\n").splitlines()[-lines:]


def run_tests(seconds: float) -> dict[str, Any] | None:
    """Part a: pytest on the files with tests marked `cuda`; None if it takes longer than `seconds`."""
    files = [str(f) for f in sorted(ROOT.glob("tests/*.py")) if "mark.cuda" in f.read_text(encoding="utf-8")]
    command = [sys.executable, "-m", "pytest", "-v", "-rs", "-o", "addopts=", "-p", "no:cacheprovider",
               "-m", "cuda", *files]  # fmt: skip
    end = time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as folder:
        status, text = run_program(command, Path(folder) / "output", seconds)
    counts = Counter(re.findall(r"^\S+::.* (PASSED|FAILED|ERROR|SKIPPED)\b.*\[", text, re.MULTILINE))
    result = {"passed": counts["PASSED"], "failed": counts["FAILED"], "errors": counts["ERROR"],
              "skipped": counts["SKIPPED"], "exit_status": status, "output": tail(text)}  # fmt: skip
    if status < 0 and time.monotonic() >= end:
        return None
    if status not in (0, 1) or not counts:
        result["error"] = f"pytest ended with exit status {status}"
    return result


def flags_of_run(config: Config, scale: Scale, rate: float | None, seconds: float) -> list[str]:
    """The flags of part d, its paths apart. At a known rate, in tokens/s, the schedule is as long as the
    time; without one, it is the default and will be cut off."""
    flags = [f"--device={config.device}"]
    if config.tiny:
        flags += [f"--n_layer={scale.n_layer}", "--n_head=1", f"--n_embd={scale.n_embd}",
                  f"--sequence_length={scale.sequence_length}", "--val_tokens=256", "--hellaswag_limit=4",
                  f"--total_batch_size={scale.total_batch_size}"]  # fmt: skip
    every = 250
    if rate is not None:
        for_steps = max(LEAST_STEPS, 0.85 * (seconds - TO_SAVE - START_UP))  # seconds
        steps = 4 if config.tiny else math.ceil(for_steps * rate / scale.total_batch_size)
        every = max(1, steps // 4)
        flags += [f"--max_steps={steps}", f"--warmup_steps={max(1, steps // 20)}"]
    scored = not missing_input("HellaSwag", config)
    return [*flags, f"--val_every={every}", f"--sample_every={every}",
            f"--hellaswag_every={every if scored else 0}"]  # fmt: skip


def run_training(
    config: Config, scale: Scale, rate: float | None, beside: Path, seconds: float
) -> dict[str, Any]:
    """Part d: train_gpt2.py on real shards, for at most `seconds`; see `flags_of_run`. What it leaves gets
    names that begin like the results' file, `beside`."""
    flags = flags_of_run(config, scale, rate, seconds)
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        paths = [f"--data_dir={config.data_dir.absolute()}", f"--log_dir={run}"]
        if not missing_input("HellaSwag", config):
            paths.append(f"--hellaswag_data={config.hellaswag_data.absolute()}")
        start = time.perf_counter()
        command = [sys.executable, "train_gpt2.py", *flags, *paths]
        status, text = run_program(
            command, beside.with_name(beside.stem + "_output.txt"), seconds - TO_SAVE, TO_SAVE - 5
        )
        result = {"exit_status": status, "seconds": time.perf_counter() - start, "flags": flags,
                  "output": tail(text)}  # fmt: skip
        if status not in (0, 128 + signal.SIGTERM):
            return result | {"error": f"train_gpt2.py ended with exit status {status}"}
        if not (run / "log.txt").exists() or not read_log(run / "log.txt")["val"]:
            return result | {"error": "train_gpt2.py was stopped before its first evaluation"}
        for name in ("log.txt", "run.json", "loss.png"):
            if (run / name).exists():
                shutil.copy(run / name, beside.with_name(f"{beside.stem}_{name}"))
        events = read_log(run / "log.txt")
        record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    rates = [float(r) for r in re.findall(r"tok/sec: ([\d.]+)", text)]
    last = {f"last_{kind}": values[-1] for kind, values in events.items() if values}
    result |= {"finished": status == 0, "max_steps": record["train_config"]["max_steps"],
               "result": record.get("result"), "n": len(rates), **last}  # fmt: skip
    if rates:
        result |= {"tokens_per_second": statistics.median(rates), "least": min(rates), "most": max(rates)}
    return result


# -----------------------------------------------------------------------------
# the record


def result_file(record: dict[str, Any], config: Config) -> Path:
    name = re.sub(r"\W+", "_", record["facts"]["device"].lower()).strip("_")
    return config.out / f"{name}{'_tiny' if config.tiny else ''}.json"


def open_record(config: Config, scale: Scale) -> tuple[dict[str, Any], Path]:
    """The results so far and their file. Raises InputError if they were measured with other versions."""
    facts = in_a_process(gather_facts, {"device": config.device, "n_embd": scale.n_embd}, LONGEST)
    if facts is None or "error" in facts:
        raise InputError(
            facts["error"].partition(": ")[2] if facts else f"--device {config.device}: no answer"
        )
    record = json.loads(to_json({"facts": facts, "parts": {}}))
    file = result_file(record, config)
    if file.exists():
        before = json.loads(file.read_text(encoding="utf-8"))
        differ = [name for name, value in record["facts"].items()
                  if name != "commit" and before["facts"].get(name) != value]  # fmt: skip
        if differ:
            raise InputError(
                f"{file} was measured with another {' and '.join(differ)}; move it away or give another --out"
            )
        record = before
    return record, file


def measure_part(
    part: str, record: dict[str, Any], save: Callable[[], None], config: Config, scale: Scale, deadline: float
) -> None:
    """Measure what a part lacks, one by one, until the deadline on the clock of time.monotonic."""
    done = record["parts"].setdefault(part, {})
    if config.retry:
        for name in [name for name, of in done.items() if "error" in of or of.get("finished") is False]:
            del done[name]
    if done and not plan(part, record, scale, config):
        print(f"part {part}: measured before, nothing to do")
    if (todo := plan(part, record, scale, config)) and not any(config.only in one.name for one in todo):
        print(f"part {part}: nothing matches --only {config.only!r} before {todo[-1].name} is measured")
    while todo := [one for one in plan(part, record, scale, config) if config.only in one.name]:
        one, left = todo[0], deadline - time.monotonic()
        result = None
        if left > (TO_SAVE + START_UP + LEAST_STEPS if part == "d" else 0):
            print(f"part {part}: {one.name} ...", flush=True)
            if part in "ad":
                result = one.function(**one.arguments, seconds=left)
            else:
                result = in_a_process(one.function, one.arguments, min(left, LONGEST))
                if result is None and left > LONGEST:
                    result = {"error": f"no result after {LONGEST} s"}
        if result is None:
            print(f"part {part}: time is up; the same command goes on with {one.name}")
            return
        done[one.name] = json.loads(to_json({**result, "commit": versions()["commit"]}))
        save()
        print(f"part {part}: {one.name}: {summary(done[one.name])}", flush=True)


def main(config: Config) -> None:
    if config.rows:
        print(tables(json.loads(config.rows.read_text(encoding="utf-8"))))
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # what was started ends, too
    started, scale = time.monotonic(), TINY if config.tiny else FULL
    record, file = open_record(config, scale)
    file.parent.mkdir(parents=True, exist_ok=True)

    def save() -> None:
        inputs = {"c": "HellaSwag", "d": "train_gpt2.py"}
        record["finished"] = [
            part for part, done in record["parts"].items()
            if done and not plan(part, record, scale, config) and inputs.get(part, next(iter(done))) in done
        ]  # fmt: skip
        write_file(file, lambda out: out.write(to_json(record).encode()))

    for part, name in (("c", "HellaSwag"), ("d", "train_gpt2.py")):
        if part in config.parts and (reason := missing_input(name, config)):
            print(f"part {part}: {name} is skipped: {reason}")
    for part in config.parts:
        now = time.monotonic()
        deadline = min(now + 60 * config.minutes_per_part, started + 60 * config.minutes)
        measure_part(part, record, save, config, scale, deadline)
    save()
    print(f"\n{tables(record)}\n\nall figures: {file}")


# -----------------------------------------------------------------------------
# what is printed


def summary(result: dict[str, Any]) -> str:
    """A measurement in one line."""
    if "error" in result:
        return f"failed: {result['error']}"
    if "passed" in result:
        return ", ".join(f"{result[name]} {name}" for name in ("passed", "failed", "errors", "skipped"))
    if "tokens_per_second" in result:
        return f"{result['tokens_per_second']:,.0f} tokens/s"
    if "flop_per_second" in result:
        return f"{result['flop_per_second'] / 1e12:,.1f} TFLOP/s"
    return "done"


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def median_rate(result: dict[str, Any]) -> str:
    return "{tokens_per_second:,.0f} ({least:,.0f} to {most:,.0f})".format(**result)


def training_rows(done: Done) -> list[list[str]]:
    """Part b: a row for each measurement, and its rate beside ours, compiled, at the same size."""
    rows = []
    for name, result in done.items():
        if "error" in result:
            rows.append([name, "failed: " + result["error"].split(":")[0], *[""] * 5])
        elif result["way"] != "matmul":
            ours = done.get(f"ours compiled, {plural(result['rows'], 'row')}", {}).get("tokens_per_second")
            memory = [f"{result[key] / GB:.1f}" if key in result else ""
                      for key in ("max_memory_allocated", "max_memory_reserved")]  # fmt: skip
            mfu = f"{result['mfu']:.1%}" if result["mfu"] else ""
            ratio = f"{result['tokens_per_second'] / ours:.2f}" if ours else ""
            rows.append([name, median_rate(result), str(result["n"]), mfu, *memory, ratio])
    return rows


def tables(record: dict[str, Any]) -> str:
    """All results as Markdown, ready for docs/results.md."""
    facts, parts = record["facts"], record["parts"]
    texts = [f"{facts['device']}, PyTorch {facts['torch']} (CUDA {facts['cuda']}), transformers "
             f"{facts['transformers']}, {facts['dtype']}."]  # fmt: skip
    for name, result in parts.get("a", {}).items():
        texts.append(f"{name}: {summary(result)}.")
    if done := parts.get("b"):
        head = ["way", "tokens/s, median (least to most)", "n", "MFU", "peak, GB allocated", "GB reserved",
                "x ours, compiled"]  # fmt: skip
        texts.append(table(head, training_rows(done)))
        for result in done.values():
            if result.get("way") == "matmul" and "error" not in result:
                texts.append(f"Matrix products alone: {summary(result)}.")
        best = max((r for r in done.values() if r.get("way") == "ours compiled" and "error" not in r),
                   key=lambda r: r["tokens_per_second"], default=None)  # fmt: skip
        if best:
            recipe = TrainConfig()
            seconds = recipe.max_steps * recipe.total_batch_size / best["tokens_per_second"]
            hours = f"{seconds / 3600:.1f} of training, computed from {median_rate(best)} tokens/s"
            texts.append(f"For the README: | 1 x {facts['device']} | {hours} | | the same |")
    for name, result in parts.get("c", {}).items():
        texts.append(f"{name} {summary(result)}" if "error" in result else
                     (sampling_table if name == "sampling" else hellaswag_table)(result))  # fmt: skip
    for result in parts.get("d", {}).values():
        texts.append(run_text(result))
    return "\n\n".join(texts)


def sampling_table(result: dict[str, Any]) -> str:
    rows = []
    for texts, figures in result["by_batch_size"].items():
        rates = figures["tokens_per_second"]
        theirs = rates["transformers"]
        for name, values in rates.items():
            ratios = [a / b for a, b in zip(values, theirs, strict=True)]
            rows.append([texts, name, training.spread(values, ",.1f"), training.spread(ratios, ".2f"),
                         str(len(values)), "yes" if figures["same_text"] else "no"])  # fmt: skip
    return table(
        ["texts at once", "way", "tokens/s, median (least to most)", "x transformers", "n", "same text"], rows
    )


def hellaswag_table(result: dict[str, Any]) -> str:
    rows = []
    for name, values in result["seconds"].items():
        key = "all_seconds" if name == "ours" else "all_seconds_one_at_a_time"
        rows.append([name, f"{result['items'] / statistics.median(values):,.1f}",
                     training.spread(values, ".2f"), str(len(values)), f"{result[key]:.1f}"])  # fmt: skip
    head = ["HellaSwag", "items/s", f"seconds for {result['items']:,} items", "n",
            f"seconds for all {result['all_items']:,}, n = 1"]  # fmt: skip
    return (
        f"{table(head, rows)}\n\n{result['different']} of {result['all_items']:,} predictions differ, summed "
        f"losses by {result['largest_difference']:.1e} nats at most."
    )


def run_text(result: dict[str, Any]) -> str:
    if "error" in result:
        return f"train_gpt2.py {summary(result)}"
    step, loss = result["last_val"]
    text = f"train_gpt2.py: validation loss {loss:.4f} at step {step} of {result['max_steps']}"
    if "tokens_per_second" in result:
        text += f", {median_rate(result)} tokens/s, n = {result['n']} steps"
    if "last_hella" in result:
        text += ", HellaSwag acc_norm {1:.4f} at step {0}".format(*result["last_hella"])
    return text + f"; {result['seconds'] / 60:.1f} min in all."


if __name__ == "__main__":
    run_command(main, Config)
