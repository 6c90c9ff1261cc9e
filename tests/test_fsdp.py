"""A model divided among the processes: the losses of DDP, the same checkpoint, to and fro."""

import shutil

from conftest import ROOT, TINY, call, run, torchrun
from support import fsdp
from support.cli import InputError
from support.curves import read_log
from support.files import sha256
from support.micro_batch import check_memory
from support.processes import World
from support.run_folder import list_checkpoints
from train_gpt2 import GPTConfig

import pytest
import torch

LAST_DIGIT = 1.01e-6  # log.txt has six
FLAGS = (*TINY, "--max_steps=20", "--val_every=10", "--sample_every=10", "--checkpoint_every=10")


def train(processes, flags, folder, *more, **options):
    return torchrun(processes, "train_gpt2.py", *flags, f"--log_dir={folder}", *more, **options)


@pytest.fixture
def flags(text_shards):
    return (*FLAGS, f"--data_dir={text_shards}")


def losses(folder, kind="train"):
    return [loss for _, loss in read_log(folder / "log.txt")[kind]]


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_it_trains_as_ddp_does(processes, flags, tmp_path):
    """20 losses within 1e-6, validation and samples, the checkpoint's files and tensors; then SIGKILL's
    effect: what was lost is trained again to the same bits."""
    flags = (*flags, "--micro_batch_size=2" if processes == 2 else "--micro_batch_size=1")
    ddp, shard = tmp_path / "ddp", tmp_path / "shard"
    plain = train(processes, flags, ddp)
    divided = train(processes, flags, shard, "--shard")
    assert "divided among" in divided.stdout
    assert losses(shard) == pytest.approx(losses(ddp), abs=LAST_DIGIT)
    assert losses(shard, "val") == pytest.approx(losses(ddp, "val"), abs=1e-4)
    said = [[line for line in done.stdout.split("\n") if "sample:" in line] for done in (plain, divided)]
    assert said[0] == said[1] != []
    last = [list_checkpoints(folder)[-1] for folder in (ddp, shard)]
    files = [{file.name for file in folder.iterdir()} for folder in last]
    assert files[0] == files[1]
    states = [torch.load(folder / "trainer.pt")["optimizer"]["state"] for folder in last]
    for i, state in states[0].items():
        for name, tensor in state.items():
            assert torch.allclose(states[1][i][name], tensor, atol=1e-6), name

    whole = sha256(last[1] / "model.safetensors"), (shard / "log.txt").read_bytes()
    shutil.rmtree(last[1])
    train(processes, flags, shard, "--shard", "--resume")
    assert (sha256(last[1] / "model.safetensors"), (shard / "log.txt").read_bytes()) == whole


@pytest.mark.slow
@pytest.mark.parametrize(("first", "second"), [("divided", "whole"), ("whole", "divided")])
def test_a_run_goes_on_the_other_way(first, second, flags, tmp_path):
    """Begun divided among two, continued whole in one process; and back."""

    def go(way, *more):
        arguments = (*flags, "--micro_batch_size=2", f"--log_dir={tmp_path}", *more)
        if way == "whole":
            run("train_gpt2.py", *arguments)
        else:
            torchrun(2, "train_gpt2.py", *arguments, "--shard")

    go(first)
    before = losses(tmp_path)
    shutil.rmtree(list_checkpoints(tmp_path)[-1])
    go(second, "--resume")
    assert losses(tmp_path) == pytest.approx(before, abs=1e-5)


@pytest.mark.slow
def test_the_search_leaves_no_trace(flags, tmp_path):
    """Each process tries for itself: one fits 4 rows, the other only 2; the losses are those of 2 rows."""
    flags = (*flags, "--checkpoint_every=0", "--sample_every=0")
    train(2, flags, tmp_path / "given", "--shard", "--micro_batch_size=2")
    done = torchrun(
        2, ROOT / "tests/faults.py", *flags, f"--log_dir={tmp_path / 'found'}", "--shard",
        env={"FAULTS": "oom=2:2 oom_rank=1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert "micro-batches of 2 rows" in done.stdout
    assert losses(tmp_path / "found") == losses(tmp_path / "given")


@pytest.mark.slow
def test_gradients_exchanged_always_or_at_the_end(flags, tmp_path):
    """Where memory is short, gradients are divided in every micro-step: the same losses."""
    flags = (*flags, "--checkpoint_every=0", "--sample_every=0", "--micro_batch_size=1")
    train(2, flags, tmp_path / "end", "--shard")
    (tmp_path / "short_of_memory.py").write_text(
        "import runpy, sys\nfrom support import fsdp\nfsdp.WHOLE_GRADIENTS = 0.0\nsys.argv.pop(0)\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    torchrun(
        2, tmp_path / "short_of_memory.py", ROOT / "train_gpt2.py", *flags, "--shard",
        f"--log_dir={tmp_path / 'always'}", env={"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert losses(tmp_path / "always") == pytest.approx(losses(tmp_path / "end"), abs=LAST_DIGIT)


def test_what_is_refused():
    one, two = (World(0, n, torch.device("cpu")) for n in (1, 2))
    with pytest.raises(InputError, match="start them with torchrun"):
        fsdp.count_shares(True, "adamw", one)
    with pytest.raises(InputError, match="Muon needs whole matrices"):
        fsdp.count_shares(True, "muon", two)
    assert fsdp.count_shares(False, "muon", two) == 1
    assert fsdp.count_shares(True, "adamw", two) == 2


def test_what_cannot_fit_says_what_would():
    """GPT-2 XL: 23.2 GB of states; on cards of 22 GB, three leave half of each free."""
    xl = GPTConfig(n_layer=48, n_head=25, n_embd=1600)
    with pytest.raises(InputError, match=r"divide it among 3 such devices: torchrun --nproc_per_node=3"):
        check_memory(xl, 22.0, World(0, 1, torch.device("cpu")))
    assert "2.90 GB for weights" in check_memory(xl, 22.0, World(0, 1, torch.device("cpu")), shares=8)


def test_alone_it_needs_torchrun(flags, tmp_path):
    done = call("train_gpt2.py", *flags, "--shard", f"--log_dir={tmp_path}", check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith("error: --shard divides the model among several processes")
