"""Not a test: SIGKILLs a small run at random moments, resumes it, and compares its end with an undisturbed
one.

    python tests/kill_trials.py KILLS SEED FOLDER FLAG...

Each trial is a fork of this process, which has everything imported: a trial costs a fraction of a second.
Prints a JSON object: kills, how many of them hit a checkpoint being written, runs finished, and the
differences found.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import train_gpt2
from support.cli import run_command
from support.files import sha256

import torch


def start(folder: Path, flags: list[str], prepare=lambda: None) -> int:
    """Fork a child that trains in `folder`, after `prepare()`; returns its process id."""
    if child := os.fork():
        return child
    out = os.open(folder.with_suffix(".out"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    prepare()
    sys.argv = ["train_gpt2.py", *flags, f"--log_dir={folder}", "--resume"]
    status = 0
    try:
        run_command(train_gpt2.main, train_gpt2.TrainConfig)
    except SystemExit as end:
        status = end.code or 0
    except BaseException:
        import traceback

        traceback.print_exc()
        status = 99
    os._exit(status)


def main(kills: int, seed: int, root: Path, flags: list[str]) -> None:
    torch.set_num_threads(1)
    random.seed(seed)
    import matplotlib.backends.backend_agg
    import matplotlib.font_manager  # noqa: F401

    began = time.monotonic()
    assert os.waitpid(start(root / "undisturbed", flags), 0)[1] == 0
    duration = time.monotonic() - began
    last = max((root / "undisturbed").glob("checkpoint_*"))
    expected = (root / "undisturbed/log.txt").read_text(), sha256(last / "model.safetensors")
    done = {"kills": 0, "in_a_save": 0, "runs": 0, "differences": 0, "resumed": 0}
    while done["kills"] < kills:
        folder = root / "killed"
        while True:
            child = start(folder, flags)
            if done["kills"] < kills:
                time.sleep(random.uniform(0.05, 0.7) * duration)
                os.kill(child, signal.SIGKILL)
            status = os.waitpid(child, 0)[1]
            if status == signal.SIGKILL:
                done["kills"] += 1
                done["in_a_save"] += bool(list(folder.glob("checkpoint_*.tmp")))
                continue
            assert status == 0, folder.with_suffix(".out").read_text()[-3000:]
            break
        found = (folder / "log.txt").read_text(), sha256(folder / last.name / "model.safetensors")
        done["differences"] += found != expected
        done["runs"] += 1
        done["resumed"] += folder.with_suffix(".out").read_text().count("resuming at step")
        shutil.rmtree(folder)
        folder.with_suffix(".out").unlink()
    print(json.dumps(done))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
