"""What several test files share: tiny shards, the scripts run as a user runs them, and where the real data
lies."""

import gc
import io
import os
import random
import runpy
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from support.data.documents import Piece
from support.data.encodings import get_encoding
from support.data.shards import ShardWriter, Stream, new_record, write_shards
from support.machine.processes import STOP_SIGNALS, World
from support.run.folder import RunFolder
from train_gpt2 import GPTConfig, TrainConfig

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parent.parent
torch.set_num_threads(1)  # as in the processes that tests start: the same bits


@pytest.fixture(scope="session")
def gpt2_data() -> Path:
    """The folder of real data: FineWeb-like parquet files, HellaSwag items, tiktoken's own files."""
    if "GPT2_TEST_DATA" not in os.environ:
        pytest.skip("GPT2_TEST_DATA names no folder with the real test data")
    return Path(os.environ["GPT2_TEST_DATA"])


def pytest_collection_modifyitems(items):
    for item in items:
        if "gpt2_data" in getattr(item, "fixturenames", ()):
            item.add_marker("real_data")


def run(
    *arguments, cwd: Path = ROOT, check: bool = True, env: dict[str, str] | None = None, timeout: float = 120
):
    """Run a Python script in a fresh process with one thread; returns the finished process, output as
    text."""
    inherited = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    environment = {**inherited, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", **(env or {})}
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env=environment,
        text=True,
        capture_output=True,
        timeout=timeout,
        check=False,
    )
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def call(script: str, *arguments, check: bool = True):
    """The same in this process, for what needs no fresh one: two seconds less."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", [script, *map(str, arguments)])
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as end:
            status = end.code or 0
        finally:
            gc.unfreeze()  # what a run has frozen, for its own time
            gc.collect()  # closes what the end of a process would: the lock of a run's folder
            for number, handler in handlers.items():
                signal.signal(number, handler)
    assert not check or status == 0, out.getvalue() + err.getvalue()
    stdout, stderr = (stream.getvalue().replace("\r", "\n") for stream in (out, err))  # as subprocess has it
    return subprocess.CompletedProcess(arguments, status, stdout, stderr)


def kill_until_done(command, env: dict[str, str], kills: int, wait, seed: int = 0):
    """Run `command` to its end, SIGKILLed `kills` times on the way, each time after `wait()` seconds."""
    random.seed(seed)
    killed = 0
    while True:
        process = subprocess.Popen([sys.executable, *command], cwd=ROOT, env={**os.environ, **env}, text=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
        try:
            out, _ = process.communicate(timeout=wait() if killed < kills else 100)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            killed += 1
            continue
        assert process.returncode == 0, out
        return killed, out


def torchrun(n: int, *arguments, **options):
    """The same under torchrun with n processes."""
    return run("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}", *arguments, **options)


def make_shards(folder: Path, sizes: list[int], vocab_size: int = 257, seed: int = 0) -> Path:
    """Shards of random tokens without a shards.json; the first size is the validation shard's."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    for i, size in enumerate(sizes):
        tokens = generator.integers(0, vocab_size, size, dtype=np.uint16)
        np.save(folder / f"edufineweb_{'train' if i else 'val'}_{i:06d}.npy", tokens)
    return folder


def bin_shard(path: Path, tokens) -> None:
    """A shard in llm.c's format."""
    header = np.zeros(256, np.int32)
    header[:3] = 20240520, 1, len(tokens)
    path.write_bytes(header.tobytes() + np.asarray(tokens, np.uint16).tobytes())


def write_texts(texts, folder: Path, shard_size: int, max_tokens=None, source=None, workers=1):
    """Shard documents given as texts, in the bytes encoding; returns the contents of shards.json."""
    settings = {"shard_size": shard_size, "max_tokens": max_tokens}
    record = new_record(get_encoding("bytes"), source or {}, settings)
    stream = Stream(Piece("texts", i, text) for i, text in enumerate(texts))
    return write_shards([stream], ShardWriter(folder, record), workers)


@pytest.fixture(scope="session")
def text_shards(tmp_path_factory) -> Path:
    """Shards in the bytes encoding of a text that a tiny model learns in seconds."""
    folder = tmp_path_factory.mktemp("text_shards")
    texts = [f"{i} green bottles hanging on the wall. " * 20 for i in range(100)]
    write_texts(texts, folder, 20_000, source={"dataset": "a rhyme"})
    return folder


CPU = World()  # one process on a CPU
SMALL = GPTConfig(block_size=64, vocab_size=300, n_layer=3, n_head=2, n_embd=48)


def run_folder(path: Path, print=print, **config) -> RunFolder:
    """The folder of a run with this configuration, in one process."""
    return RunFolder(TrainConfig(log_dir=path, **config), CPU, print)


def faulty(faults, *flags, launch=run, **options):
    """`train_gpt2.py` with faults, see faults.py."""
    env = {"FAULTS": faults, "PYTHONPATH": str(ROOT)}
    return launch(ROOT / "tests/faults.py", *flags, env=env, **options)


TINY = (
    "--n_layer=2",
    "--n_head=2",
    "--n_embd=32",
    "--sequence_length=32",
    "--total_batch_size=256",
    "--warmup_steps=2",
    "--max_lr=3e-3",
    "--val_tokens=1024",
    "--hellaswag_every=0",
    "--device=cpu",
)
