"""One process or several: the same batch, the same gradients, the same losses."""

from conftest import ROOT, TINY, call, run, torchrun
from support.run.curves import read_log

import pytest
import torch


def gradients(tmp_path, text_shards, name, launch, micro_batch_size):
    file = tmp_path / name
    launch(
        ROOT / "tests/faults.py",
        *TINY,
        "--max_steps=1",
        "--grad_clip=1e9",
        "--sample_every=0",
        f"--micro_batch_size={micro_batch_size}",
        f"--data_dir={text_shards}",
        f"--log_dir={tmp_path / name}_log",
        env={"FAULTS": f"gradients={file}", "PYTHONPATH": str(ROOT)},
    )
    return torch.load(f"{file}0"), file


def relative_difference(a, b):
    difference = sum((a[name] - b[name]).double().square().sum() for name in a).sqrt()
    return (difference / sum(t.double().square().sum() for t in a.values()).sqrt()).item()


@pytest.mark.slow
@pytest.mark.parametrize("rows", [2, 8])
def test_gradients_do_not_depend_on_the_layout(rows, tmp_path, text_shards):
    """8 rows a step: in 4 micro-steps (or at once), and in 2 micro-steps of 2 processes."""
    one_process, _ = gradients(tmp_path, text_shards, "one", run, rows)
    two_processes, file = gradients(tmp_path, text_shards, "two", lambda *a, **k: torchrun(2, *a, **k), 2)
    assert relative_difference(one_process, two_processes) < 1e-6
    other_rank = torch.load(f"{file}1")
    assert all(torch.equal(two_processes[name], other_rank[name]) for name in other_rank)


@pytest.mark.slow
def test_two_processes_train_as_one_does(tmp_path, text_shards):
    common = (*TINY, f"--data_dir={text_shards}", "--max_steps=12", "--val_every=5", "--sample_every=6")
    call("train_gpt2.py", *common, "--micro_batch_size=2", f"--log_dir={tmp_path / 'one'}")
    done = torchrun(2, "train_gpt2.py", *common, "--micro_batch_size=4", f"--log_dir={tmp_path / 'two'}")
    assert "256 tokens a step = 4 rows x 32 tokens x 2 processes x 1 micro-step" in done.stdout
    assert done.stdout.count("step 12: validation loss") == 1  # only one process speaks
    one, two = read_log(tmp_path / "one" / "log.txt"), read_log(tmp_path / "two" / "log.txt")
    assert [step for step, _ in one["val"]] == [0, 5, 10, 12]
    assert len(one["train"]) == 12
    for kind in ("train", "val"):
        for (step, a), (other_step, b) in zip(one[kind], two[kind], strict=True):
            assert step == other_step
            assert a == pytest.approx(b, abs=2e-4)


@pytest.mark.slow
def test_bad_input_is_said_once_by_all_processes(tmp_path):
    done = torchrun(2, "train_gpt2.py", *TINY, f"--data_dir={tmp_path / 'nowhere'}", check=False)
    assert done.returncode != 0
    assert done.stderr.count("error: the data folder") == 1
