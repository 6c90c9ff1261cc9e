"""--check: it tries everything that a run does, says what is wrong, and leaves nothing behind."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

from conftest import ROOT, TINY, call, faulty, make_shards, run, torchrun
from pretended_gpu import pretended_gpu
from support.files import sha256, to_json
from support.machine.device import card_name
from support.machine.measure import describe_device
from support.machine.processes import World
from support.run import check
from support.run.check import Check, rehearse, told
from support.run.findings import REPORTED, Findings
from train_gpt2 import MAY_CHANGE, TrainConfig, get_lr

import pytest
import torch

ITEMS = [
    {
        "ind": i,
        "ctx": "A man sits on a roof. He",
        "endings": ["sings.", "eats.", "runs.", "sleeps."],
        "label": i % 4,
    }
    for i in range(12)
]


def files_of(folder):
    """The bytes of every file, by path."""
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def flags(text_shards, log_dir, *more):
    return (*TINY, f"--data_dir={text_shards}", f"--log_dir={log_dir}", "--max_steps=40", *more, "--check")


def rows_of(output):
    return dict(re.findall(r"^([\w ]+): +(.*)$", output, re.MULTILINE))


# ------------------------------------------------------------------ the whole check


def test_a_check_tries_everything_and_changes_nothing(text_shards, tmp_path, monkeypatch):
    """Beside a run that exists: not a byte of it changes."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    log_dir = tmp_path / "deep/log"
    log_dir.mkdir(parents=True)
    (log_dir / "log.txt").write_text("0 train 5.0\n1 train 4.0\n")
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in ITEMS))
    before = files_of(tmp_path)
    items = (f"--hellaswag_data={tmp_path}/items.jsonl", "--hellaswag_every=10", "--dollars_per_hour=3600")
    done = call("train_gpt2.py", *flags(text_shards, log_dir, *items))
    assert files_of(tmp_path) == before
    assert [path.name for path in log_dir.iterdir()] == ["log.txt"]
    rows = rows_of(done.stdout)
    assert re.fullmatch(r"cpu .*; 1 process", rows["device"])
    assert rows["HellaSwag"] == "10 items scored"
    assert rows["samples"] == "written"
    assert rows["checkpoint"].endswith("resumed: the same digits")
    assert rows["data"] == "3 shards, 55,900 training tokens, 0.18 epochs"
    assert abs(float(rows["first loss"].split(";")[0]) - math.log(257)) < 0.1
    rate = float(rows["speed"].split()[0].replace(",", ""))
    cost = float(re.search(r"\$([\d.,]+)", rows["cost"])[1].replace(",", ""))
    assert cost == pytest.approx(40 * 256 / rate, rel=0.02, abs=0.01)  # a dollar a second
    assert f"WARNING: {log_dir} already holds a run; continue it with --resume" in done.stdout
    assert "WARNING: less than 1,000,000 tokens" in done.stdout
    assert done.stdout.index("WARNING") < done.stdout.index("device:")


@pytest.mark.slow
def test_two_processes_check_under_torchrun(text_shards, tmp_path):
    done = torchrun(2, "train_gpt2.py", *flags(text_shards, tmp_path / "deep/log"))
    rows = rows_of(done.stdout)
    assert done.stdout.count("device:") == 1
    assert rows["device"].endswith("2 processes")
    assert float(rows["links"].split()[0]) > 0.01
    assert rows["checkpoint"].endswith("resumed: the same digits")
    assert list(tmp_path.iterdir()) == []  # not even the folder for the run


@pytest.mark.slow
def test_two_processes_without_torchrun(text_shards, tmp_path):
    """As a batch system starts them: the check holds the store that torchrun would hold."""
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29487", "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "train_gpt2.py", *flags(text_shards, tmp_path / "log")]
    both = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=200) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert rows_of(outputs[0][0])["checkpoint"].endswith("resumed: the same digits")
    assert outputs[1][0] == ""


@pytest.mark.slow
def test_the_demo_is_checked(tmp_path):
    done = run(ROOT / "train_gpt2.py", "--demo", "--check", cwd=tmp_path)
    assert rows_of(done.stdout)["checkpoint"].endswith("resumed: the same digits")
    assert [path.name for path in tmp_path.iterdir()] == ["demo_data"]  # the run will not have to write it


# ------------------------------------------------------------------ faults


def is_one_line(done, status, text):
    """Whether an error's line is the only one, beside what torchrun says; and the status is this."""
    lines = re.findall(r"^error: .*", done.stderr, re.MULTILINE)
    assert len(lines) == 1, done.stdout + done.stderr
    assert re.search(text, lines[0]), lines
    assert done.returncode == status
    return True


def test_bad_input_is_found(text_shards, tmp_path):
    (tmp_path / "file").write_text("")
    with_check = flags(text_shards, tmp_path / "file")
    for all_flags in (with_check, with_check[:-1]):
        done = call("train_gpt2.py", *all_flags, check=False)
        assert is_one_line(done, 2, "--log_dir .*/file: is a file, not a folder$")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("faults", "status", "text"),
    [
        ("forget=weights", 1, "the loss of the resumed step is [\\d.]+, and was [\\d.]+: the checkpoint"),
        ("forget=moments", 1, "the validation loss of the resumed step is [\\d.]+, and was"),
        ("disk=1000000", 1, "File too large; allow larger files"),
        ("die=0:2", 1, "SIGKILL ended a process"),
        ("nan=0:2", 1, "the loss of rank 0 is nan"),
        ("oom=0", 2, "out of memory with a micro-batch of 1 row"),
    ],
)
def test_a_fault_is_one_line(faults, status, text, text_shards, tmp_path):
    done = faulty(faults, *flags(text_shards, tmp_path / "log"), check=False)
    if faults == "forget=weights":  # then both losses differ
        done.stderr = done.stderr.split("\n")[0]
    assert is_one_line(done, status, text)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_token_outside_the_vocabulary_is_found(tmp_path):
    shards = make_shards(tmp_path / "shards", [2000, 20_000], vocab_size=60_000)
    done = call("train_gpt2.py", *flags(shards, tmp_path / "log", "--sample_every=0"), check=False)
    assert is_one_line(done, 2, r"token id \d+ at offset \d+, outside the vocabulary")
    assert [path.name for path in tmp_path.iterdir()] == ["shards"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("faults", "text"),
    [
        ("die=1:2", "rank 1: SIGKILL ended a process"),
        ("oom_step=2 oom_rank=1", "rank 1: out of memory"),
        ("die=0:2", "SIGKILL ended a process"),
    ],
)
def test_a_fault_of_one_of_two_processes(faults, text, text_shards, tmp_path):
    """The other one does not wait for the time limit, and what it lost is not told."""
    started = time.monotonic()
    done = faulty(
        faults,
        *flags(text_shards, tmp_path / "log"),
        check=False,
        launch=lambda *a, **o: torchrun(2, *a, **o),
    )
    assert is_one_line(done, 1, text)
    assert time.monotonic() - started < 100
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_process_that_hangs_is_one_line(text_shards, tmp_path):
    more = flags(text_shards, tmp_path / "log", "--timeout_minutes=0.5")
    done = faulty("slow=1000", *more, check=False)
    assert is_one_line(done, 1, "five steps, .*: not done in 0.5 minutes")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_check_that_is_stopped_leaves_nothing(number, text_shards, tmp_path):
    command = [sys.executable, ROOT / "tests/faults.py", *flags(text_shards, tmp_path / "log")]
    env = {**os.environ, "FAULTS": "slow=1000", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not list(tmp_path.glob("log/trial.*/run.json")):
        time.sleep(0.1)
        assert process.poll() is None
    process.send_signal(number)
    process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert list(tmp_path.iterdir()) == []
    ours = subprocess.run(["pgrep", "-f", str(tmp_path)], capture_output=True, text=True, check=False).stdout
    assert ours == ""


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")
@pytest.mark.parametrize(
    ("name", "text"), [("SIGKILL", "memory was short"), ("SIGABRT", "line: NCCL timeout$")]
)
def test_what_a_signal_means(name, text, monkeypatch, tmp_path):
    """The system sends SIGKILL where memory is short; NCCL and the C library end a process by SIGABRT."""
    code = f"import os, signal; print('NCCL timeout', flush=True); os.kill(os.getpid(), signal.{name})"
    monkeypatch.setattr(sys, "argv", ["-c", code])
    end = Check(TrainConfig(log_dir=tmp_path), get_lr).run_child("measure")
    assert end["status"] == -getattr(signal, name)
    assert re.match(f"{name} ended a process; .*{text}", *end["errors"])


def test_what_is_told_of_a_fault():
    fine, lost = {"status": 0, "errors": [], "last": ""}, "lost contact with another process, which died"
    assert told([fine, {"status": 1, "errors": ["no GPU"], "last": ""}]) == ["rank 1: no GPU"]
    both = [{"status": 1, "errors": [lost], "last": ""}, {"status": 1, "errors": ["SIGKILL"], "last": ""}]
    assert told(both) == ["rank 1: SIGKILL"]
    assert told([both[0], both[0]]) == [lost]
    same = {"status": 2, "errors": ["no such folder"], "last": ""}
    assert told([same, same]) == ["no such folder"]
    assert told([fine, {"status": 1, "errors": [], "last": "KeyError: 3"}])[0].endswith("KeyError: 3")


def test_a_check_that_failed_is_not_restarted(monkeypatch, tmp_path):
    """torchrun --max_restarts would run it again."""
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert Check(TrainConfig(log_dir=tmp_path), get_lr).run() == 1


# ------------------------------------------------------------------ what is concluded

FACTS = {
    "device": "NVIDIA A100-SXM4-80GB",
    "world_size": 8,
    "precision": "bfloat16, torch.compile on",
    "attention": "flash_attention",
    "memory": "1.85 GB for weights, gradients and the optimizer's two moments",
    "parameters": 124_439_808,
    "flops_per_token": 857e6,
    "model_config": {"n_layer": 12, "n_embd": 768, "vocab_size": 50257},
    "recipe": {"n_layer": 12, "data": "the fingerprint", "order_of_tokens": 2, "max_lr": 1e-4},
    "data": {"train_tokens": 9_900_000_000, "train_shards": 99},
    "warm_up_step_seconds": 0.4,
    "micro_batch_size": 64,
    "grad_accum_steps": 1,
    "hellaswag_items": 10,
    "versions": {"torch": "2.13.0", "python": "3.11"},
}
PROCESS = {
    "device": FACTS["device"],
    "host_memory": 500e9,
    "driver": "570",
    "memory": 80e9,
    "used": 1e9,
    "idle": 0,
}
MACHINE = {"processes": [PROCESS] * 8, "links": 200e9, "disk_free": 500e9, "disk_speed": 1e9}
STEP = 0.375  # seconds: 1.4 million tokens/s


def findings(folder, config=None, facts=None, machine=None, loss=10.95, step=STEP, lines=()):
    """As a check of 8 A100 would leave them, with changes."""
    checkpoint = folder / "trial/checkpoint_00004"
    checkpoint.mkdir(parents=True)
    with open(checkpoint / "model", "wb") as file:
        file.truncate(1_500_000_000)  # sparse
    events = [[0, "step 4: saved x/checkpoint_00004 in 2.5 s"]]
    (folder / "trial/machine.json").write_text(to_json({**MACHINE, **(machine or {})}))
    (folder / "trial/run.json").write_text(to_json({**FACTS, **(facts or {})}))
    (folder / "trial/status.json").write_text(to_json({"step_seconds": step, "events": events}))
    (folder / "trial/log.txt").write_text(f"0 val {loss}\n")
    config = replace(TrainConfig(log_dir=folder / "log"), **(config or {}))
    return Findings(config, folder / "trial", list(lines), get_lr)


def test_a_healthy_machine_has_no_warnings(tmp_path):
    found = findings(tmp_path, {"dollars_per_hour": 14.4})
    assert found.warnings() == []
    rows = rows_of(found.table("the same digits"))
    rate = 524_288 / STEP
    assert rows["speed"] == f"{rate:,.0f} tokens/s, MFU {rate * 857e6 / (8 * 312e12):.0%}"
    assert rows["others"] == "1,456,000 tokens/s (build-nanogpt's video, compiled)"
    assert rows["time"].startswith("about 1 h 59 min")  # 19,073 x 0.375 s
    assert rows["cost"].startswith("about $28.61")
    assert rows["power cut"] == "loses 6 min 18 s ($1.51) at the worst moment"  # 1,000 steps and a save
    assert rows["disk"].endswith("up to 10.5 GB needed")  # 2 + 1 + 1 and steps 5,000, 10,000, 15,000
    assert rows["links"] == "200.0 GB/s (bus bandwidth of an all-reduce): 4.4 ms for a step's gradients"


def test_a_wide_model_begins_higher(tmp_path):
    """Its logits vary more."""
    wide = {"model_config": {"n_layer": 2, "n_embd": 4096, "vocab_size": 50257}}
    assert findings(tmp_path, facts=wide, loss=11.64).warnings() == []


@pytest.mark.parametrize(
    "changes", [{"facts": {"precision": "float32, torch.compile on"}}, {"config": {"recompute": True}}]
)
def test_others_figures_are_for_what_they_ran(changes, tmp_path):
    found = findings(tmp_path, step=1.0, **changes)
    assert found.reported() is None
    assert found.warnings() == []


@pytest.mark.parametrize(
    ("changes", "warning"),
    [
        ({"lines": ["training without HellaSwag: no network"]}, "training without HellaSwag: no network"),
        (
            {"facts": {"precision": "bfloat16, torch.compile off: no C compiler"}},
            "without torch.compile.*no C compiler",
        ),
        ({"machine": {"disk_free": 10e9}}, "need up to 10.5 GB, .* has 10.0 GB free"),
        ({"step": 1.0}, "524,288 tokens/s are far below the 1,456,000"),
        ({"machine": {"links": 10e9}}, "slow links: exchanging gradients takes 0.09 s"),
        (
            {"machine": {"processes": [PROCESS | {"host_memory": 2e9}]}},
            "training will wait for every checkpoint",
        ),
        ({"machine": {"processes": [PROCESS | {"used": 30e9}]}}, "other programs use 30.0 GB"),
        ({"machine": {"processes": [PROCESS | {"idle": 3}]}}, "3 GPUs would be idle"),
        ({"machine": {"processes": [PROCESS, PROCESS | {"device": "T4"}]}}, "the devices differ"),
        ({"loss": 12.0}, "the loss before training is 12.00"),
        ({"loss": 11.6}, "the loss before training is 11.60; a model that knows nothing has about 10.98"),
        ({"loss": "nan"}, "the loss before training is nan"),
        ({"config": {"max_steps": 40_000}}, "reads its data 2.1 times"),
        ({"config": {"max_steps": 500}}, "the learning rate never reaches --max_lr"),
        ({"facts": {"device": "cpu (x86_64, 2 cores)"}, "step": 20.0}, "would train on the CPU"),
    ],
)
def test_a_warning(changes, warning, tmp_path):
    (line,) = findings(tmp_path, **changes).warnings()
    assert re.search(warning, line), line


@pytest.mark.parametrize(
    ("config", "warnings", "refusals"),
    [
        ({"seed": 5, "resume": True}, [], []),
        ({"resume": True}, [], [".*can't be resumed with another recipe: seed was 5, is 1337$"]),
        ({}, [".*already holds a run; continue it with --resume"], []),
    ],
)
def test_what_the_run_will_say_about_its_folder(config, warnings, refusals, tmp_path):
    """A check reads the folder as the run will, and changes nothing there. What --resume refuses is a fault;
    that --resume is missing, a warning."""
    then = FACTS["recipe"] | TrainConfig(seed=5).recipe_fields()
    facts = {"run_id": "1", "interruptions": 0, "saved": False, "recipe": then}
    (tmp_path / "log").mkdir()
    (tmp_path / "log/run.json").write_text(to_json(facts))
    (tmp_path / "log/log.txt").write_text("0 train 11.0\n")
    before = files_of(tmp_path / "log")
    found = findings(tmp_path, config)
    for expected, lines in ((warnings, found.warnings()), (refusals, found.refusals)):
        assert len(lines) == len(expected)
        assert all(map(re.match, expected, lines)), lines
    assert files_of(tmp_path / "log") == before


def test_what_is_left_of_a_run(tmp_path):
    (tmp_path / "log").mkdir()
    for step in (10, 20):
        folder = tmp_path / f"log/checkpoint_{step:05}"
        folder.mkdir()
        state = dict.fromkeys(("optimizer", "scaler", "rng", "loss"))
        recipe = FACTS["recipe"] | TrainConfig().recipe_fields()
        torch.save({**state, "step": step, "recipe": recipe}, folder / "trainer.pt")
        (folder / "model.safetensors").write_bytes(b"")
        (folder / "config.json").write_bytes(b"")
        names = sorted(file.name for file in folder.iterdir())
        sums = "".join(f"{sha256(folder / name)}  {name}\n" for name in names)
        (folder / "SHA256SUMS").write_text(sums)
    (tmp_path / "log/checkpoint_00020/config.json").write_bytes(b"damaged")
    found = findings(tmp_path, {"resume": True})
    assert found.training_seconds == (19_073 - 10) * STEP
    assert [re.search("DAMAGED: .*_00020", line) is not None for line in found.warnings()] == [True]


def test_a_child_is_read_to_its_end_though_nobody_reads_the_check(monkeypatch, tmp_path):
    """`--check | head`: the child would wait for ever to print, and the thread end in a traceback."""
    trial = Check(TrainConfig(log_dir=tmp_path), get_lr)

    def nobody(text):
        raise BrokenPipeError

    monkeypatch.setattr(trial, "print", nobody)
    lines: list[str] = []
    trial.read_lines(SimpleNamespace(stdout=["step 0 | loss\n", "done\n"]), lines)
    assert lines == ["step 0 | loss", "done"]


def test_gpus_that_have_a_process_are_not_idle(monkeypatch, tmp_path):
    """Without torchrun, LOCAL_WORLD_SIZE may be missing."""
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    for processes, idle in ((2, 0), (1, 1)):
        with pretended_gpu(count=2):
            assert describe_device(World(0, processes, torch.device("cuda", 0)))["idle"] == idle
    two_hosts = {"processes": [PROCESS | {"idle": 8 - 16}]}
    assert findings(tmp_path, machine=two_hosts).warnings() == []


def test_a_run_that_would_take_years_is_not_tried(tmp_path):
    trial = Check(TrainConfig(log_dir=tmp_path), get_lr)
    trial.folder.mkdir()
    assert trial.too_slow() is None
    (trial.folder / "run.json").write_text(to_json(FACTS | {"warm_up_step_seconds": 90.0}))
    assert trial.too_slow() is None
    (trial.folder / "run.json").write_text(to_json(FACTS | {"warm_up_step_seconds": 3600.0}))
    assert "a step would take about 1 h 00 min" in trial.too_slow()


def test_every_card_that_others_report_is_known():
    assert {card_name(name) for name in REPORTED} == set(REPORTED)


def test_a_child_does_what_the_run_does(monkeypatch, tmp_path):
    """What decides the memory and the speed stays as the flags have it."""
    monkeypatch.setenv("GPT2_CHECK_PHASE", "train")
    monkeypatch.setenv("GPT2_CHECK_FOLDER", str(tmp_path))
    asked: list[str] = []
    monkeypatch.setattr(check, "check_tracker", asked.append)  # not every machine has one
    config = TrainConfig(check=True, resume=True, tracker="wandb", val_every=0)
    child = rehearse(config, get_lr)
    assert asked == ["wandb"]  # whether it is installed; nothing is sent to it
    different = {name for name, value in vars(config).items() if vars(child)[name] != value}
    assert different - MAY_CHANGE == {"max_steps", "max_lr", "warmup_steps", "schedule", "cooldown"}
    assert (child.log_dir, child.resume, child.tracker) == (tmp_path, False, None)
    assert "check" in MAY_CHANGE  # --resume does not compare it
