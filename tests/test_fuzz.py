"""Every file that the scripts read, damaged at random: the result is right, or one line says what is
wrong. No traceback, no changed file."""

import gzip
import json
import random
import shutil
from pathlib import Path

from conftest import TINY, call
from support.model.huggingface import list_checkpoints
from support.run.watch import Watcher

import pyarrow
import pyarrow.parquet
import pytest
from test_hellaswag import GOOD


@pytest.fixture(scope="module")
def sound(text_shards, tmp_path_factory) -> Path:
    """A run's folder, its data, HellaSwag items, and text of three kinds."""
    folder = tmp_path_factory.mktemp("sound")
    shutil.copytree(text_shards, folder / "shards")
    call("train_gpt2.py", *TINY, f"--data_dir={folder}/shards", f"--log_dir={folder}/log", "--max_steps=4",
         "--checkpoint_every=2", "--val_every=2", "--sample_every=0")  # fmt: skip
    items = [json.dumps({**GOOD, "ctx": f"The {i}", "ind": i}) for i in range(6)]
    (folder / "items.jsonl").write_text("\n".join(items))
    rows = [f"document {i} of a small corpus. " * 9 for i in range(40)]
    lines = "\n".join(json.dumps({"text": row}) for row in rows).encode()
    (folder / "x.jsonl").write_bytes(lines)
    (folder / "x.jsonl.gz").write_bytes(gzip.compress(lines, mtime=0))
    pyarrow.parquet.write_table(pyarrow.table({"text": rows}), folder / "x.parquet")
    return folder


def damage(data: bytes) -> bytes:
    """The bytes with one thing wrong: flipped bits, an end that is missing, parts that changed places, zeros
    as a power cut leaves them, something in between, nothing at all."""
    a, b = sorted(random.randrange(len(data) + 1) for _ in range(2))
    kind = random.choice(["flip", "flip", "cut", "swap", "zero", "insert", "empty"])
    if kind == "flip":
        flipped = bytearray(data)
        for _ in range(random.choice([1, 3, 50])):
            flipped[random.randrange(len(data))] ^= 1 << random.randrange(8)
        return bytes(flipped)
    return {
        "cut": data[:a],
        "swap": data[b:] + data[a:b] + data[:a],
        "zero": data[:a] + bytes(b - a) + data[b:],
        "insert": data[:a] + random.randbytes(9) + data[a:],
        "empty": b"",
    }[kind]


def readers(folder: Path) -> dict[str, list[tuple]]:
    """For each file, the commands that read it."""
    name = list_checkpoints(folder / "log")[-1].relative_to(folder)
    train = ("train_gpt2.py", *TINY, f"--data_dir={folder}/shards", "--sample_every=0", "--val_every=2")
    start = (*train, f"--log_dir={folder}/new", "--max_steps=1", "--verify")
    resume = (*train, f"--log_dir={folder}/log", "--max_steps=4", "--checkpoint_every=2", "--resume")
    sample = (
        "sample.py",
        f"--model={folder / name}",
        "--max_new_tokens=2",
        "--num_samples=1",
        "--device=cpu",
    )
    score = ("hellaswag.py", f"--model={folder / name}", f"--data={folder}/items.jsonl", "--device=cpu")
    plot, positions = ("plot.py", "run", folder / "log"), ("plot.py", "positions", folder / name)
    shards = [f"shards/{path.name}" for path in sorted((folder / "shards").glob("[es]*"))]
    check = ("fineweb.py", f"--check={folder}/shards")
    found = {shard: [start, check] for shard in shards}
    found |= {f"log/{file}": [plot] for file in ("log.txt", "run.json", "status.json")}
    found |= {f"{name}/{file}": [resume] for file in ("trainer.pt", "SHA256SUMS", "model.safetensors")}
    found[f"{name}/config.json"] = [sample, score]
    found[f"{name}/model.safetensors"] += [sample, score, (*positions, f"--out={folder}/wpe.png")]
    found |= {f"{name}/{file}": [sample] for file in ("tokenizer.json", "vocab.json")}
    found["items.jsonl"] = [score]
    for text in ("x.jsonl", "x.jsonl.gz", "x.parquet"):
        make = ("fineweb.py", f"--input={folder / text}", "--encoding=bytes", "--shard_size=2000")
        found[text] = [(*make, f"--output_dir={folder}/out")]
    return found


SLOW = [pytest.param(seed, 30, marks=pytest.mark.slow) for seed in range(1, 11)]


@pytest.mark.parametrize(("seed", "trials"), [(0, 10), *SLOW])
def test_a_damaged_file_is_named_or_read_aright(seed, trials, sound, tmp_path):
    random.seed(seed)
    for trial in range(trials):
        folder = tmp_path / str(trial)
        shutil.copytree(sound, folder)
        name, commands = random.choice(list(readers(folder).items()))
        command = random.choice(commands)
        data = damage((folder / name).read_bytes())
        (folder / name).write_bytes(data)
        may_change = ("log/", "new/", "out/") if "--resume" in command else ("log/loss.png", "new/", "out/")
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        done = call(*command, check=False)
        about = f"{trial}: {name}, {command}, {done.returncode}: {done.stderr[-600:]}"
        errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert done.returncode in (0, 1, 2), about
        assert len(errors) == (done.returncode != 0), about
        assert "Traceback" not in done.stdout + done.stderr, about
        if name == "log/status.json":
            Watcher(folder / "log").data()
        for path, contents in before.items():
            if not str(path.relative_to(folder)).startswith(may_change):
                assert path.read_bytes() == contents, about
        shutil.rmtree(folder)
