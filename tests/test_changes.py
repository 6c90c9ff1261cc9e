"""
A change touches one place: each test makes a change that a learner would make, in a copy of train_gpt2.py,
and trains with it. docs/reading.md has them as exercises.
"""

import json
import math
import shutil
import sys
import types

from conftest import ROOT, TINY, call, run
from support.cli import InputError
from support.files import sha256
from support.machine.processes import World
from support.model.huggingface import list_checkpoints
from support.run.curves import read_log, read_run
from support.run.watch import Watcher
from train_gpt2 import GPT

import pytest
import torch
from transformers import AutoModelForCausalLM

RUN = (*TINY, "--max_steps=6", "--val_every=3", "--sample_every=6", "--checkpoint_every=3")


@pytest.fixture
def change(tmp_path):
    """A function that writes train_gpt2.py with `changes`, pairs of old and new text; it returns the path."""

    def make(*changes):
        text = (ROOT / "train_gpt2.py").read_text(encoding="utf-8")
        for old, new in changes:
            assert text.count(old) == 1, old
            text = text.replace(old, new)
        (tmp_path / "train_gpt2.py").write_text(text, encoding="utf-8")
        return tmp_path / "train_gpt2.py"

    return make


@pytest.fixture
def flags(tmp_path, text_shards):
    return (*RUN, f"--data_dir={text_shards}", f"--log_dir={tmp_path / 'log'}")


def resumes_to_the_same_bits(script, flags, folder, *more):
    """Take the last checkpoint away and train again."""
    last = list_checkpoints(folder)[-1]
    before = sha256(last / "model.safetensors"), (folder / "log.txt").read_bytes()
    shutil.rmtree(last)
    done = call(script, *flags, *more, "--resume")
    assert "resuming at step 3" in done.stdout
    return (sha256(last / "model.safetensors"), (folder / "log.txt").read_bytes()) == before


# ------------------------------------------------------------------ a new value in the log


def test_a_value_is_one_call(change, flags, tmp_path, monkeypatch):
    """It is in log.txt, status.json, the tracker, the picture and the page, and survives --resume."""
    logged = []
    wandb = types.ModuleType("wandb", "")
    wandb.__spec__ = types.SimpleNamespace(name="wandb", origin="wandb.py")
    wandb.init = lambda **_: None
    wandb.finish = lambda: None
    wandb.log = lambda values, step: logged.append((step, values))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    step = "            report.step(step, train_loss, lr, grad_norm, time.perf_counter() - started)\n"
    script = change((step, f"{step}            report.log(step, twice=torch.tensor(2 * train_loss))\n"))
    flags = (*flags, "--tracker=wandb")
    call(script, *flags)
    events = read_log(tmp_path / "log/log.txt")
    expected = [(step, pytest.approx(2 * loss, rel=1e-5)) for step, loss in events["train"]]
    assert events["twice"] == expected
    assert [(step, values["twice"]) for step, values in logged if "twice" in values] == expected
    status = json.loads((tmp_path / "log/status.json").read_text())
    assert status["values"]["twice"] == list(expected[-1])
    call("plot.py", "run", tmp_path / "log", f"--out={tmp_path / 'picture.svg'}")
    assert "twice" in (tmp_path / "picture.svg").read_text()  # matplotlib notes each text it draws
    assert len(Watcher(tmp_path / "log").data()["curves"]["twice"]) == 6
    assert resumes_to_the_same_bits(script, flags, tmp_path / "log")


# ------------------------------------------------------------------ a new flag


def test_a_flag_is_a_field_and_resume_compares_it(change, flags, tmp_path):
    seed = "    seed: cli.Seed = 1337"
    script = change((seed, f"    z_loss: float = 0.1  # my idea\n{seed}"))
    call(script, *flags, "--z_loss=0.2", "--max_steps=4")
    done = call(script, *flags, "--max_steps=4", "--resume", check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "can't be resumed with another recipe: z_loss was 0.2, is 0.1" in done.stderr
    done = call("train_gpt2.py", *flags, "--max_steps=4", "--resume", check=False)
    assert "z_loss was 0.2, is None" in done.stderr  # the code without the flag


@pytest.mark.slow
def test_a_run_from_before_the_flag_had_its_default(change, flags, tmp_path):
    call("train_gpt2.py", *flags)
    seed = "    seed: cli.Seed = 1337"
    script = change((seed, f"    z_loss: float = 0.1  # my idea\n{seed}"))
    shutil.rmtree(list_checkpoints(tmp_path / "log")[-1])
    done = call(script, *flags, "--z_loss=0.2", "--resume", check=False)
    assert "z_loss was 0.1, is 0.2" in done.stderr
    call(script, *flags, "--resume", "--val_tokens=2048")  # what may change is listed
    assert read_run(tmp_path / "log")["val_tokens"] == 2048


# ------------------------------------------------------------------ another optimizer

SGD = (
    ('optimizer: Literal["adamw", "muon"] = "adamw"', 'optimizer: Literal["adamw", "muon", "sgd"] = "adamw"'),
    (
        '    if config.optimizer == "muon":\n',
        '    if config.optimizer == "sgd":\n'
        "        return torch.optim.SGD(parameters, lr=config.max_lr, momentum=0.9, fused=False)\n"
        '    if config.optimizer == "muon":\n',
    ),
)


def test_another_optimizer_is_a_flag_and_its_line(change, flags, tmp_path):
    """The losses are those of SGD with momentum written out; the table, the card and resume follow."""
    script = change(*SGD)
    flags = (*flags, "--optimizer=sgd", "--max_lr=0.5", "--weight_decay=0")
    done = call(script, *flags)
    assert "recipe:      tutorial: SGD, cosine, at most 0.5" in done.stdout
    losses = [loss for _, loss in read_log(tmp_path / "log/log.txt")["train"]]
    assert losses[-1] < losses[0] - 0.3
    card = (list_checkpoints(tmp_path / "log")[-1] / "README.md").read_text()
    assert "SGD" in card
    assert "Adam" not in card
    assert resumes_to_the_same_bits(script, flags, tmp_path / "log")


def test_another_optimizer_leaves_a_step_that_is_not_finite_out(change, flags, tmp_path, monkeypatch):
    """It has no found_inf, so the host decides; as with AdamW, the run ends in one line."""
    script = change(*SGD)
    clip, steps, stepped = torch.nn.utils.clip_grad_norm_, [], []

    def clip_nan(parameters, largest):
        steps.append(0)
        return clip(parameters, largest) * (math.nan if len(steps) == 3 else 1)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip_nan)
    sgd = torch.optim.SGD.step
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self, *a: (stepped.append(0), sgd(self, *a)))
    done = call(script, *flags, "--optimizer=sgd", check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: step 2: the gradient norm is nan")
    assert len(stepped) == 2


# ------------------------------------------------------------------ another model

DROPOUT = (
    (
        '    encoding: str = "gpt2"  # what',
        '    dropout: float = 0.0  # share of values set to zero\n    encoding: str = "gpt2"  # what',
    ),
    (
        "    seed: cli.Seed = 1337",
        "    dropout: float = 0.0  # share of values set to zero\n    seed: cli.Seed = 1337",
    ),
    (
        "        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)\n",
        "        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)\n"
        "        self.dropout = nn.Dropout(config.dropout)\n",
    ),
    (
        "        return self.c_proj(self.gelu(self.c_fc(x)))\n",
        "        return self.dropout(self.c_proj(self.gelu(self.c_fc(x))))\n",
    ),
)


def test_dropout_works_in_training_alone(change, flags, tmp_path):
    """The training loss is another one; the validation loss is Hugging Face's, which has none; a resumed
    run has the same dropout, and goes on with the same bits."""
    script = change(*DROPOUT)
    flags = (*flags, "--dropout=0.3")
    done = call(script, *flags)
    assert "not a GPT-2" not in done.stdout
    log = tmp_path / "log/log.txt"
    call(script, *flags, "--dropout=0", f"--log_dir={tmp_path / 'plain'}")
    first = [read_log(folder / "log.txt")["train"][0][1] for folder in (tmp_path / "log", tmp_path / "plain")]
    assert abs(first[0] - first[1]) > 1e-4
    model = AutoModelForCausalLM.from_pretrained(list_checkpoints(tmp_path / "log")[-1])
    shards = load_validation(flags)
    logits = model(shards[:, :-1]).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), shards[:, 1:].flatten()).item()
    assert read_log(log)["val"][-1][1] == pytest.approx(loss, abs=1e-4)
    assert resumes_to_the_same_bits(script, flags, tmp_path / "log")


@pytest.mark.slow
def test_masks_depend_on_seed_step_and_rank_alone(change, flags, tmp_path, monkeypatch):
    """The trial of micro-batches uses none of the random numbers up; a new start from the weights keeps the
    flag; another value is refused by --resume."""
    script = change(*DROPOUT)
    told, found = tmp_path / "told", tmp_path / "found"
    flags = (*flags, "--dropout=0.3", "--max_steps=3", "--sample_every=0")
    call(script, *flags, f"--log_dir={found}")
    call(script, *flags, f"--log_dir={told}", f"--micro_batch_size={read_run(found)['micro_batch_size']}")
    assert (told / "log.txt").read_bytes() == (found / "log.txt").read_bytes()
    seeds, seed = [], World.seed
    monkeypatch.setattr(World, "seed", lambda self, *s: (seeds.append(s), seed(self, *s)))
    call(script, *flags, f"--init_from={found}", f"--log_dir={tmp_path / 'tuned'}", "--dropout=0.2")
    assert read_run(tmp_path / "tuned")["model_config"]["dropout"] == 0.2
    assert seeds == [(1337, 0), (1337, 1), (1337, 2)]
    done = call(script, *flags, f"--log_dir={found}", "--dropout=0.1", "--resume", check=False)
    assert "dropout was 0.3, is 0.1" in done.stderr
    numbers = []
    for rank, step in ((0, 5), (1, 5), (0, 6), (0, 5)):
        World(rank, 2).seed(1337, step)
        numbers.append(torch.rand(()).item())
    assert numbers[0] == numbers[3]
    assert len(set(numbers)) == 3


def load_validation(flags):
    """The 32 windows of 32 tokens that TINY validates on."""
    import numpy as np

    (folder,) = (flag.removeprefix("--data_dir=") for flag in flags if flag.startswith("--data_dir"))
    tokens = np.load(f"{folder}/edufineweb_val_000000.npy").astype(np.int64)
    return torch.from_numpy(np.stack([tokens[i * 32 : i * 32 + 33] for i in range(32)]))


def test_rms_norms_are_not_exported_as_a_gpt2(change, flags, tmp_path):
    """The model trains, samples and resumes; the export says that GPT-2's format has no place for it, and
    nothing loads it as what it is not."""
    text = (ROOT / "train_gpt2.py").read_text(encoding="utf-8")
    script = tmp_path / "train_gpt2.py"
    script.write_text(text.replace("nn.LayerNorm(", "nn.RMSNorm("), encoding="utf-8")
    done = call(script, *flags)
    assert "export:      not a GPT-2: it has no transformer.h.0.ln_1.bias" in done.stdout
    assert done.stdout.count("step 6: sample:") == 1
    last = list_checkpoints(tmp_path / "log")[-1]
    assert "It is not a GPT-2" in (last / "README.md").read_text()
    with pytest.raises(ValueError, match="changed-gpt2"):
        AutoModelForCausalLM.from_pretrained(last)
    done = call("sample.py", f"--model={last}", "--device=cpu", check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "not a GPT-2: it has no transformer.h.0.ln_1.bias; load it with the train_gpt2.py" in done.stderr
    shutil.copy(ROOT / "sample.py", tmp_path)
    sample = ("--num_samples=1", "--max_new_tokens=5", "--device=cpu")
    done = run(tmp_path / "sample.py", f"--model={last}", *sample, env={"PYTHONPATH": str(ROOT)})
    assert done.stdout.startswith("> Hello")
    assert resumes_to_the_same_bits(script, flags, tmp_path / "log")


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ('nn.GELU(approximate="tanh")', "nn.ReLU()", "with the same weights, GPT-2 has other logits"),
        ("4 * config.n_embd", "2 * config.n_embd", "its MLPs are not four times as wide"),
        ("        self.ln_2 = nn.LayerNorm(config.n_embd)\n",
         "        self.ln_2 = nn.LayerNorm(config.n_embd)\n"
         "        self.scale = nn.Parameter(torch.ones(1))\n", "it has transformer.h.0.scale"),
    ],
)  # fmt: skip
def test_any_other_model_is_noticed(old, new, reason):
    """By its tensors, or by what it computes."""
    text = (ROOT / "train_gpt2.py").read_text(encoding="utf-8")
    assert old in text
    module = types.ModuleType("changed")
    sys.modules["changed"] = module  # dataclasses look there
    exec(compile(text.replace(old, new), "changed", "exec"), module.__dict__)
    model = module.GPT(module.GPTConfig(block_size=8, vocab_size=11, n_layer=1, n_head=1, n_embd=8))
    assert reason in model.change_from_gpt2()


def test_a_field_of_the_model_travels_with_it(tmp_path):
    """What changes the function by its value alone is noticed, too: saved with the weights, loaded with them
    by the same code, and refused by the code that does not know it."""
    text = (ROOT / "train_gpt2.py").read_text(encoding="utf-8")
    for old, new in (
        (
            '    encoding: str = "gpt2"  # what',
            '    relu: bool = False  # ReLU for GELU\n    encoding: str = "gpt2"  # what',
        ),
        ('nn.GELU(approximate="tanh")', 'nn.ReLU() if config.relu else nn.GELU(approximate="tanh")'),
    ):
        assert old in text
        text = text.replace(old, new)
    module = types.ModuleType("changed")
    sys.modules["changed"] = module
    exec(compile(text, "changed", "exec"), module.__dict__)
    sizes = {"block_size": 8, "vocab_size": 257, "n_layer": 1, "n_head": 1, "n_embd": 8, "encoding": "bytes"}
    assert module.GPT(module.GPTConfig(**sizes)).change_from_gpt2() is None
    model = module.GPT(module.GPTConfig(**sizes, relu=True))
    model.save_pretrained(tmp_path)
    idx = torch.arange(8).view(1, 8)
    loaded = module.GPT.from_pretrained(tmp_path)
    assert loaded.config.relu
    assert torch.equal(loaded(idx), model(idx))
    with pytest.raises(InputError, match="with the same weights, GPT-2 has other logits; load it with the"):
        GPT.from_pretrained(tmp_path)
