"""The recipe's functions at their edges, and the training script as a user types it."""

import json
import math
import re
import shutil
from dataclasses import fields, replace
from itertools import pairwise
from pathlib import Path

from conftest import CPU, ROOT, TINY, call, run, write_texts
from support import VERSION
from support.cli import InputError
from support.data.encodings import get_encoding
from support.data.shards import load_shards
from support.files import sha256
from support.machine.device import autocast_to
from support.machine.processes import World
from support.model.huggingface import list_checkpoints
from support.run.curves import read_log
from train_gpt2 import (
    DEMO,
    GPT,
    GPTConfig,
    TokenLoader,
    TrainConfig,
    choose_defaults,
    choose_model_config,
    configure_optimizer,
    estimate_val_loss,
    get_lr,
)

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM


def test_the_schedule_at_its_edges():
    config = TrainConfig()
    assert get_lr(0, config) == pytest.approx(6e-4 / 715)
    assert get_lr(714, config) == pytest.approx(6e-4)
    assert get_lr(715, config) == pytest.approx(6e-4)
    middle = (715 + 19073) / 2
    assert get_lr(int(middle), config) == pytest.approx(6e-4 * 0.55, rel=1e-3)
    assert get_lr(19072, config) == pytest.approx(6e-5, rel=1e-3)
    assert get_lr(19073, config) == get_lr(10**6, config) == pytest.approx(6e-5)
    rates = [get_lr(step, config) for step in range(715, 19074)]
    assert rates == sorted(rates, reverse=True)
    no_warmup = replace(config, warmup_steps=0, max_steps=1)
    assert get_lr(0, no_warmup) == pytest.approx(6e-4)
    assert get_lr(5, replace(config, warmup_steps=10, max_steps=10)) == pytest.approx(3.6e-4)


def test_the_recipe_is_the_tutorials():
    config = TrainConfig()
    assert (config.total_batch_size, config.max_steps, config.warmup_steps) == (524288, 19073, 715)
    assert (config.max_lr, config.weight_decay, config.grad_clip) == (6e-4, 0.1, 1.0)
    assert config.val_tokens == 20 * config.total_batch_size


def test_only_matrices_decay_and_every_parameter_is_optimised():
    model = GPT(GPTConfig(block_size=16, vocab_size=100, n_layer=2, n_head=2, n_embd=16))
    optimizer = configure_optimizer(model, TrainConfig())
    decaying, others = optimizer.param_groups
    assert (decaying["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    assert {id(p) for p in decaying["params"]} == {id(p) for p in model.parameters() if p.dim() == 2}
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {
        id(p) for p in model.parameters()
    }
    assert all(group["betas"] == (0.9, 0.95) and group["eps"] == 1e-8 for group in optimizer.param_groups)


@pytest.mark.parametrize("momentum", [None, 0.8, 0.0])
def test_the_optimizer_is_adamw_as_published(momentum):
    """One parameter, three steps, against Algorithm 2 of the AdamW paper written out."""
    model = torch.nn.Linear(1, 1, bias=False)
    config = TrainConfig(max_lr=0.1, momentum=momentum)
    optimizer = configure_optimizer(model, config)
    beta1 = 0.9 if momentum is None else momentum
    w, m, v = model.weight.item(), 0.0, 0.0
    for t, gradient in enumerate((0.5, -2.0, 0.1), 1):
        model.weight.grad = torch.full((1, 1), gradient)
        optimizer.step()
        m, v = beta1 * m + (1 - beta1) * gradient, 0.95 * v + 0.05 * gradient**2
        update = (m / (1 - beta1**t)) / (math.sqrt(v / (1 - 0.95**t)) + 1e-8)
        w -= 0.1 * (update + 0.1 * w)
        assert model.weight.item() == pytest.approx(w, rel=1e-5)


def plain_training(text_shards, steps, clip):
    """The same few steps, written out: the whole batch at once, gradients clipped by hand, AdamW one tensor
    at a time. Returns the weights, and the losses."""
    torch.manual_seed(1337)
    model = GPT(GPTConfig(block_size=32, vocab_size=257, n_layer=2, n_head=2, n_embd=32, encoding="bytes"))
    tokens = np.load(text_shards / "edufineweb_train_000001.npy").astype(np.int64)
    moments = {name: [torch.zeros_like(p), torch.zeros_like(p)] for name, p in model.named_parameters()}
    losses = []
    for step in range(steps):
        rows = np.stack([tokens[i * 32 : i * 32 + 33] for i in range(8 * step, 8 * step + 8)])
        rows = torch.from_numpy(rows)
        logits = model(rows[:, :-1])
        loss = -torch.log_softmax(logits, dim=-1).gather(-1, rows[:, 1:, None]).mean()
        losses.append(loss.item())
        model.zero_grad()
        loss.backward()
        norm = math.sqrt(sum(p.grad.square().sum().item() for p in model.parameters()))
        shrink = min(1.0, clip / (norm + 1e-6))
        lr = 3e-3 * (step + 1) / 4  # --warmup_steps=4
        with torch.no_grad():
            for name, p in model.named_parameters():
                g, (m, v) = p.grad * shrink, moments[name]
                m.mul_(0.9).add_(g, alpha=0.1)
                v.mul_(0.95).addcmul_(g, g, value=0.05)
                update = (m / (1 - 0.9 ** (step + 1))) / ((v / (1 - 0.95 ** (step + 1))).sqrt() + 1e-8)
                decay = 0.1 if p.dim() >= 2 else 0.0
                p.sub_(lr * (update + decay * p))
    return model.state_dict(), losses


@pytest.mark.parametrize("clip", [0.4, 1e9])
def test_training_is_what_it_says_step_by_step(clip, text_shards, tmp_path):
    """Four steps of the script, in micro-batches, beside the same written out. The norm changes from step to
    step, so clipping shows in the weights, though AdamW does not care for a constant factor."""
    flags = ("--max_steps=4", "--warmup_steps=4", "--no_shuffle", "--micro_batch_size=2", "--val_every=0")
    flags = (*flags, "--sample_every=0", f"--grad_clip={clip}", f"--data_dir={text_shards}")
    call("train_gpt2.py", *TINY, *flags, f"--log_dir={tmp_path}")
    expected, losses = plain_training(text_shards, 4, clip)
    assert [loss for _, loss in read_log(tmp_path / "log.txt")["train"]] == pytest.approx(losses, abs=2e-6)
    trained = GPT.from_pretrained(tmp_path).state_dict()
    worst = max((trained[name] - expected[name]).abs().max().item() for name in expected)
    other, _ = plain_training(text_shards, 4, 0.4 if clip > 1 else 1e9)
    apart = max((other[name] - expected[name]).abs().max().item() for name in expected)
    assert worst < 2e-5
    assert apart > 20 * worst  # with the other clipping the weights are elsewhere


@pytest.mark.parametrize(("batch_size", "n_windows"), [(4, 10), (1, 3), (3, 3), (8, 5)])
def test_every_window_of_the_validation_counts_the_same(batch_size, n_windows, text_shards, monkeypatch):
    """Also those of a last batch that is not full; against the mean of the windows, one at a time."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=32, vocab_size=257, n_layer=1, n_head=2, n_embd=32, encoding="bytes"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5)  # far from uniform: the windows' losses differ
    config = TrainConfig(sequence_length=32, val_tokens=32 * n_windows)
    shards = load_shards(text_shards)
    loader = TokenLoader(shards, "val", config)
    assert loader.n_windows == n_windows
    alone = []
    for i in range(n_windows):
        x, y = loader.windows(i, 1)
        with torch.no_grad():
            alone.append(model(x, y).item())
    autocast = autocast_to(CPU.device, torch.float32)
    parts = []
    loss = estimate_val_loss(model, loader, batch_size, autocast, lambda *part: parts.append(part))
    assert loss == pytest.approx(sum(alone) / n_windows, abs=1e-5)
    assert max(alone) - min(alone) > 0.1
    n_batches = math.ceil(n_windows / batch_size)
    assert parts == [(i, n_batches) for i in range(n_batches + 1)]
    monkeypatch.setattr(World, "sum", lambda _, values: values)  # what each of two processes adds
    loaders = [TokenLoader(shards, "val", config, World(rank, 2)) for rank in range(2)]
    halves = [estimate_val_loss(model, half, batch_size, autocast) for half in loaders]
    assert sum(halves) == pytest.approx(loss, abs=1e-5)


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory, text_shards):
    folder = tmp_path_factory.mktemp("run") / "log"
    done = call(
        "train_gpt2.py",
        *TINY,
        f"--data_dir={text_shards}",
        f"--log_dir={folder}",
        "--max-steps=60",
        "--val_every=20",
        "--sample_every=30",
        "--checkpoint_every=25",
    )  # both spellings of a flag work
    return folder, done


def test_a_run_leaves_its_folder(finished_run, text_shards):
    folder, done = finished_run
    assert {path.name for path in folder.iterdir()} == {
        ".lock",
        "log.txt",
        "run.json",
        "status.json",
        "loss.png",
        "checkpoint_00050",
        "checkpoint_00060",
    }
    events = read_log(folder / "log.txt")
    assert [step for step, _ in events["train"]] == list(range(60))
    assert [step for step, _ in events["val"]] == [0, 20, 40, 60]
    assert abs(events["val"][0][1] - math.log(257)) < 0.1
    assert [step for step, _ in events["lr"]] == [step for step, _ in events["norm"]] == list(range(60))
    assert events["val"][-1][1] < 3.5
    lines = (folder / "log.txt").read_text().splitlines()
    assert all(re.fullmatch(r"\d+ (train|val|lr|norm) [\d.e-]+", line) for line in lines)
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    record = json.loads((folder / "run.json").read_text())
    assert record["model_config"]["encoding"] == record["encoding"] == "bytes"
    assert record["train_config"]["max_lr"] == 3e-3
    names = ("max_lr", "warmup_steps", "max_steps", "schedule")
    config = TrainConfig(**{name: record["train_config"][name] for name in names})
    assert [lr for _, lr in events["lr"]] == pytest.approx([get_lr(i, config) for i in range(60)], rel=1e-5)
    assert record["data"]["dataset"] == "a rhyme"
    assert record["val_tokens"] == 1024
    for fact in (
        "device:",
        "parameters",
        "256 tokens a step",
        "epochs",
        "1,024 tokens",
        "training will take about",
    ):
        assert fact in done.stdout
    assert done.stdout.count("step 60: sample: Hello, I'm a language model,") == 1


def test_a_checkpoint_is_a_whole_hugging_face_folder(finished_run):
    checkpoint = list_checkpoints(finished_run[0])[-1]
    assert {path.name for path in checkpoint.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.json",
        "merges.txt",
        "trainer.pt",
        "README.md",
        "loss.png",
        "SHA256SUMS",
    }
    for line in (checkpoint / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split()
        assert sha256(checkpoint / name) == digest
    trained = json.loads((finished_run[0] / "run.json").read_text())
    trainer = torch.load(checkpoint / "trainer.pt", weights_only=True)
    assert trainer["step"] == 60
    assert AutoModelForCausalLM.from_pretrained(checkpoint).num_parameters() == trained["parameters"]


def test_the_last_weights_are_the_measured_ones(finished_run, text_shards):
    """The final validation loss in the log is that of the final checkpoint, computed here by Hugging Face."""
    import numpy as np

    folder, _ = finished_run
    model = AutoModelForCausalLM.from_pretrained(list_checkpoints(folder)[-1])
    tokens = torch.from_numpy(np.load(text_shards / "edufineweb_val_000000.npy").astype(np.int64))
    losses = []
    for start in range(0, 1024, 32):
        row = tokens[start : start + 33]
        logits = model(row[:-1].unsqueeze(0)).logits[0]
        losses.append(torch.nn.functional.cross_entropy(logits, row[1:]).item())
    assert sum(losses) / len(losses) == pytest.approx(read_log(folder / "log.txt")["val"][-1][1], abs=1e-4)


def test_the_same_command_twice_gives_the_same_run(finished_run, text_shards, tmp_path):
    call(
        "train_gpt2.py",
        *TINY,
        f"--data_dir={text_shards}",
        f"--log_dir={tmp_path}/log",
        "--max_steps=60",
        "--val_every=20",
        "--sample_every=0",
        "--checkpoint_every=60",
    )
    assert (tmp_path / "log/log.txt").read_text() == (finished_run[0] / "log.txt").read_text()
    assert sha256(tmp_path / "log/checkpoint_00060/model.safetensors") == sha256(
        finished_run[0] / "checkpoint_00060/model.safetensors"
    )


def test_training_starts_from_given_weights(finished_run, text_shards, tmp_path):
    folder, _ = finished_run
    command = (
        "train_gpt2.py",
        *TINY[4:],
        "--sequence_length=32",
        f"--data_dir={text_shards}",
        "--max_steps=1",
        "--sample_every=0",
        f"--init_from={folder}",
    )
    call(*command, f"--log_dir={tmp_path}/log")
    first = read_log(tmp_path / "log/log.txt")["val"][0]
    assert first == (0, read_log(folder / "log.txt")["val"][-1][1])
    done = call(*command, "--n_layer=7", f"--log_dir={tmp_path}/other", check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert f"--n_layer 7: --init_from {folder} has 2" in done.stderr
    done = call(*command, "--model=gpt2-medium", f"--log_dir={tmp_path}/other", check=False)
    assert f"--model gpt2-medium, n_layer 24: --init_from {folder} has 2" in done.stderr
    done = call(*command, "--model=gpt2", f"--log_dir={tmp_path}/other", check=False)  # named, though default
    assert f"--model gpt2, n_layer 12: --init_from {folder} has 2" in done.stderr
    done = call(*command, "--model=gpt2-medium", "--n_layer=7", f"--log_dir={tmp_path}/other", check=False)
    assert f"--n_layer 7: --init_from {folder} has 2" in done.stderr  # the flag wins over the model's shape


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--data_dir=/nowhere/at/all",), "the data folder /nowhere/at/all does not exist"),
        (("--total_batch_size=100",), "--total_batch_size 100 can't be divided"),
        (("--micro_batch_size=3",), "--micro_batch_size 3 does not divide the 8 rows"),
        (("--n_head=3",), "n_embd 32 can't be divided among n_head 3"),
        (("--hellaswag_every=5", "--hellaswag_data=/nowhere.jsonl"), "/nowhere.jsonl"),
        (("--device=cuda",), "--device cuda"),
        (("--init_from=/nowhere/model",), "there is no folder /nowhere/model"),
        (("--max_steps=-1",), "--max_steps -1"),
    ],
)
def test_bad_input_gets_one_line_and_status_2(flags, message, text_shards, tmp_path):
    if flags == ("--device=cuda",) and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = call(
        "train_gpt2.py", *TINY, f"--data_dir={text_shards}", f"--log_dir={tmp_path}/log", *flags, check=False
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert message in done.stderr
    assert not (tmp_path / "log").exists()


def test_a_second_run_in_the_same_folder_is_refused(finished_run, text_shards):
    folder, _ = finished_run
    before = (folder / "log.txt").read_text()
    done = call("train_gpt2.py", *TINY, f"--data_dir={text_shards}", f"--log_dir={folder}", check=False)
    assert done.returncode == 2
    assert "already holds a run" in done.stderr
    assert (folder / "log.txt").read_text() == before


def test_the_demo_runs(tmp_path):
    """The README's command with fewer steps; --demo changes defaults, flags after it still count."""
    done = run(
        ROOT / "train_gpt2.py",
        "--demo",
        "--device=cpu",
        "--max_steps=4",
        "--val_tokens=4096",
        "--sample_every=0",
        cwd=tmp_path,
    )
    assert DEMO.log_dir.as_posix() == "log/demo"
    assert "4 steps" in done.stdout
    assert {".lock", "log.txt", "run.json", "status.json", "loss.png", "checkpoint_00004"} == {
        p.name for p in (tmp_path / "log/demo").iterdir()
    }
    record = json.loads((tmp_path / "demo_data/shards.json").read_text())
    assert record["encoding"] == "bytes"
    assert record["tokens"] > 1_000_000


@pytest.mark.slow
def test_the_demo_on_ones_own_text(tmp_path, text_shards, monkeypatch):
    """A folder that is not there is an error, not the demo's prose under another name."""
    monkeypatch.chdir(tmp_path)
    flags = ("--demo", "--max_steps=1", "--val_tokens=1024")
    done = call("train_gpt2.py", *flags, "--data_dir=my_byte", check=False)
    assert "the data folder my_byte does not exist" in done.stderr
    assert not Path("my_byte").exists()
    done = call("train_gpt2.py", *flags, f"--data_dir={text_shards}")
    assert "done: 1 step;" in done.stdout


def test_a_mix_of_data_sets(text_shards, tmp_path):
    """The validation loss of each, and of the mix; the shares are compared on --resume."""
    texts = [f"{i} bottles of beer on the wall; take one down, pass it around. " * 20 for i in range(99)]
    other = tmp_path / "beer"
    other.mkdir()
    write_texts(texts, other, 20_000)
    mix = [*TINY, f"--log_dir={tmp_path / 'log'}", "--sample_every=0", "--val_every=4", "--data_dir"]
    done = call("train_gpt2.py", *mix, f"{text_shards}:1", f"{other}:3", "--max_steps=4")
    assert re.search(r"mix: +text_shards0 25.0%, beer 75.0%", done.stdout)
    log = read_log(tmp_path / "log/log.txt")
    rhyme, beer, both = (dict(log[kind])[4] for kind in ("val_text_shards0", "val_beer", "val"))
    assert both == pytest.approx(rhyme / 4 + 3 * beer / 4, abs=1e-4)
    assert f"validation loss {both:.4f} on" in done.stdout
    assert f", val_beer {beer:.4f}" in done.stdout
    card = (tmp_path / "log/checkpoint_00004/README.md").read_text()
    assert "trained from scratch on 25.0% a rhyme; 75.0% text of unrecorded source" in card
    done = call("train_gpt2.py", *mix, f"{text_shards}:1", f"{other}:2", "--resume", check=False)
    assert done.returncode == 2
    assert "data was" in done.stderr


def test_importing_the_files_does_nothing(tmp_path):
    files = ", ".join(
        ".".join(file.relative_to(ROOT).with_suffix("").parts)
        for file in (*ROOT.glob("*.py"), *ROOT.glob("support/**/*.py"))
        if file.stem != "__init__"
    )
    code = (
        f"import sys, {files}; heavy = {{'transformers', 'datasets', 'matplotlib'}} & set(sys.modules);"
        "assert not heavy, heavy; torch = sys.modules.get('torch');"
        "assert torch is None or not torch.cuda.is_initialized()"
    )
    done = run("-X", "dev", "-W", "error", "-c", code, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)})
    assert done.stdout + done.stderr == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("file", ["train_gpt2", "fineweb", "hellaswag", "sample", "plot"])
def test_help_helps(file):
    done = call(f"{file}.py", "--help")
    assert "usage:" in done.stdout
    assert "default" in done.stdout or file == "plot"
    assert "None" not in done.stdout
    assert call(f"{file}.py", "--version").stdout.startswith(f"{file}.py {VERSION}, Python 3.")


def test_a_value_that_looks_like_help_is_missed():
    done = call("sample.py", "--prompt", "-h", check=False)
    assert done.returncode == 2
    assert "--prompt" in done.stderr


def test_help_has_headings():
    """They stand as comments in the dataclass; tyro itself has none for flags without a prefix."""
    lines = call("train_gpt2.py", "--help").stdout.splitlines()
    headings = [line.strip() for before, line in pairwise(lines) if not before and re.match(r" \w", line)]
    assert headings[:4] == ["options", "the run", "the model", "the recipe"]
    assert len(headings) == 7
    flags = [match[1] for line in lines if (match := re.match(r"  --(\w+)", line))]
    assert flags == ["version", *(field.name for field in fields(TrainConfig))]


def test_the_state_dictionary_is_listed():
    """As in the lecture: names and shapes of the 124M model, none of which needs data or a download."""
    rows = [line.split() for line in call("train_gpt2.py", "--describe").stdout.splitlines()]
    assert ["transformer.wpe.weight", "[1024,", "768]", "786,432"] in rows
    assert ["transformer.h.11.mlp.c_fc.weight", "[3072,", "768]", "2,359,296"] in rows
    assert len(rows) == 2 + 12 * 12 + 2 + 1 + 1
    assert rows[-1][0] == "124,439,808"


def test_the_state_dictionary_has_the_vocabulary_of_the_data(text_shards):
    said = call("train_gpt2.py", "--model=demo", f"--data_dir={text_shards}", "--describe").stdout
    assert "[257, 192]" in said
    assert "[257, 192]" in call("train_gpt2.py", "--demo", "--data_dir", "--describe").stdout


def test_a_model_can_be_named_beside_the_demo():
    assert (
        choose_model_config(choose_defaults(["train_gpt2.py", "--demo"]), get_encoding("bytes")).n_layer == 2
    )
    named = replace(DEMO, model="gpt2-medium")
    assert choose_model_config(named, get_encoding("bytes")).n_layer == 24
    assert choose_model_config(replace(named, n_layer=3), get_encoding("bytes")).n_layer == 3


def test_the_demo_goes_on_with_any_model_of_bytes(tmp_path):
    GPT(GPTConfig(128, 257, 3, 2, 48, encoding="bytes")).save_pretrained(tmp_path)
    config = replace(DEMO, init_from=str(tmp_path))
    assert choose_model_config(config, get_encoding("bytes")).n_layer == 3
    with pytest.raises(InputError, match=r"--model gpt2, n_layer 12: --init_from .* has 3"):
        choose_model_config(replace(config, model="gpt2"), get_encoding("bytes"))


@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("muon", marks=pytest.mark.slow)])
def test_float16_recovers_from_overflows_and_resumes(optimizer, text_shards, tmp_path, monkeypatch):
    """On the CPU as on a GPU without bfloat16: the scale is far too large at first, so that the first steps
    are skipped; then the losses follow float32's. A run that stops and resumes ends with the same bits."""
    make = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *a, **k: make(*a, **{**k, "init_scale": 2.0**26}))
    flags = (
        *TINY,
        f"--data_dir={text_shards}",
        f"--optimizer={optimizer}",
        "--val_every=0",
        "--sample_every=0",
    )
    flags = (*flags, "--max_steps=20", "--checkpoint_every=12", "--dtype=float16")
    call("train_gpt2.py", *flags, f"--log_dir={tmp_path / 'whole'}")
    losses = [loss for _, loss in read_log(tmp_path / "whole/log.txt")["train"]]
    state = torch.load(tmp_path / "whole/checkpoint_00020/trainer.pt")
    assert state["scaler"]["scale"] < 2.0**26
    assert 5 < state["optimizer"]["state"][0]["step"] < 20  # the others were skipped
    assert losses[-1] < losses[0] - 0.5
    shutil.copytree(tmp_path / "whole", tmp_path / "half")
    shutil.rmtree(tmp_path / "half/checkpoint_00020")
    call("train_gpt2.py", *flags, f"--log_dir={tmp_path / 'half'}", "--resume")
    for file in ("log.txt", "checkpoint_00020/model.safetensors"):
        assert (tmp_path / "half" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
