"""Ready shards from a Hub: the right ones, whole or not at all, through faults and kills."""

import io
import json
import os
import random
import re
import shutil
import threading
from contextlib import redirect_stdout

import fineweb
from conftest import TINY, bin_shard, call, kill_until_done, make_shards, write_texts
from hub import COMMIT, serve
from support.cli import InputError, RunFault
from support.data import hub as hub_room
from support.data.documents import File
from support.data.hub import TEMPORARY
from support.data.ready_shards import choose_shards
from support.data.shards import load_shards, open_shard
from support.files import lock_folder, sha256
from support.run.curves import comparable_loss

import numpy as np
import pytest

NAME = "someone/tokens"
SIZES = [3000, 5000, 5000, 5000, 1200]  # tokens of the validation shard, then of those for training


def tokens_of(i):
    """Those of shard `i`, in GPT-2's vocabulary."""
    return np.random.default_rng(i).integers(0, 50_257, SIZES[i], dtype=np.uint16)


def shard_name(i, suffix=".bin"):
    return f"some_{'train' if i else 'val'}_{i:06d}{suffix}"


def write_shard(path, tokens):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".bin":
        bin_shard(path, tokens)
    else:
        np.save(path, tokens)


@pytest.fixture(params=[".bin"])
def folder(tmp_path, request):
    """A folder to serve, with a dataset of five shards and what else lies in such a repository."""
    repository = tmp_path / "hub/datasets" / NAME
    for i in range(5):
        write_shard(repository / ("data" if i > 2 else "") / shard_name(i, request.param), tokens_of(i))
    (repository / "README.md").write_text("train on these")
    (repository / "train_gpt.py").write_text("pass")
    (repository / "hellaswag_val.bin.txt").write_text("no shard")
    return tmp_path / "hub"


@pytest.fixture
def online(folder, monkeypatch):
    """Serve `folder` to the Hub's library in this process; yields the requests, and a dictionary for faults
    to come."""
    from huggingface_hub import constants

    faults = {}
    with serve(folder, faults) as (env, requests):
        monkeypatch.setattr(constants, "ENDPOINT", env["HF_ENDPOINT"])
        template = env["HF_ENDPOINT"] + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(hub_room, "RETRY_AFTER", (0, 0))
        monkeypatch.setenv("NO_PROXY", "*")
        yield requests, faults


def fetch(out, **flags):
    """fineweb.py --shards, without its command line; returns what it says."""
    config = fineweb.ShardConfig(**{"shards": NAME, "output_dir": out, **flags})
    with redirect_stdout(io.StringIO()) as said:
        fineweb.main(config)
    return said.getvalue()


def refusal(out, kind=InputError, **flags):
    """The message, of one line, with which it ends."""
    try:
        fetch(out, **flags)
    except kind as error:
        message = str(error)
    else:
        pytest.fail("it did not end with an error")
    assert "\n" not in message
    return message


def got(requests):
    """The files whose download began, in order."""
    return [path.rsplit("/")[-1] for method, path, _ in requests if method == "GET" and "/resolve/" in path]


def files_in(folder):
    return {path.name for path in folder.iterdir()}


def assert_unfinished(out):
    with pytest.raises(InputError, match="is not finished: run the same"):
        load_shards(out)


def assert_whole(out, n=5, suffix=".bin"):
    """The first `n` shards, as they are on the Hub, and their record, which it returns."""
    names = [shard_name(i, suffix) for i in range(n)]
    assert files_in(out) == {".lock", "shards.json", *names}
    record = json.loads((out / "shards.json").read_text())
    assert [entry["file"] for entry in record["shards"]] == names
    assert record["tokens"] == sum(SIZES[:n])
    for i, entry in enumerate(record["shards"]):
        assert np.array_equal(open_shard(out / names[i]), tokens_of(i))
        assert entry == {"file": names[i], "tokens": SIZES[i], "sha256": sha256(out / names[i])}
    load_shards(out, verify=True)
    return record


@pytest.mark.parametrize("folder", [".bin", ".npy"], indirect=True)
def test_all_shards_come(folder, online, tmp_path):
    """Both formats; the validation shard first; a second time, not even the Hub is asked."""
    (suffix,) = {path.suffix for path in folder.rglob("*_000000.*")}
    requests, _ = online
    said = fetch(tmp_path / "out")
    record = assert_whole(tmp_path / "out", suffix=suffix)
    assert record["encoding"] == "gpt2"
    assert record["source"] == {"dataset": NAME, "revision": COMMIT}
    assert got(requests) == [shard_name(i, suffix) for i in range(5)]
    assert f"{NAME} at {COMMIT[:8]}: about 19,200 tokens in 5 shards\n" in said
    assert "training can start when all are here" in said
    assert re.search(
        rf"^[\d.]+k of about [\d.]+kB \| \S+B/s \| .* left, {shard_name(4, suffix)}$", said, re.M
    )
    assert "19,200 tokens in 5 shards in" in said
    requests.clear()
    assert "is finished: 19,200 tokens in 5 shards" in fetch(tmp_path / "out")
    assert not requests


def test_a_model_trains_on_them(online, tmp_path):
    """...and its losses are not held against those on FineWeb-Edu's validation shard."""
    done = call("fineweb.py", f"--shards={NAME}", f"--output_dir={tmp_path}/out", "--max_tokens=8000")
    assert "\r" not in done.stderr
    flags = f"--data_dir={tmp_path}/out", f"--log_dir={tmp_path}/log", "--max_steps=2"
    trained = call("train_gpt2.py", *TINY, *flags, "--verify", "--micro_batch_size=4")
    assert "done: 2 steps" in trained.stdout
    assert "OpenAI" not in trained.stdout
    facts = json.loads((tmp_path / "log/run.json").read_text())
    assert (facts["data"]["dataset"], facts["data"]["train_tokens"]) == (NAME, 5000)
    assert not comparable_loss(facts)


def test_max_tokens_takes_whole_shards_only(online, tmp_path):
    for max_tokens, n in ((1, 2), (8000, 2), (8001, 3), (19_200, 5), (10**6, 5)):
        online[0].clear()
        fetch(tmp_path / str(max_tokens), max_tokens=max_tokens)
        assert_whole(tmp_path / str(max_tokens), n)
        assert len(got(online[0])) == n


def test_more_tokens_later_add_shards(online, tmp_path):
    """A trial first, then the rest: nothing comes twice; asking for less changes nothing."""
    requests, faults = online
    fetch(tmp_path / "out", max_tokens=8000)
    requests.clear()
    assert "is finished: 8,000" in fetch(tmp_path / "out", max_tokens=4000)
    assert not requests
    faults[shard_name(2)] = ["gated"]
    refusal(tmp_path / "out")
    assert not (tmp_path / "out/shards.json").exists()
    faults.clear()
    requests.clear()
    assert "in 5 shards, 2 of them here already" in fetch(tmp_path / "out")
    assert got(requests) == [shard_name(i) for i in (2, 3, 4)]
    assert requests[0][1].endswith(f"/revision/{COMMIT}"), "of the same commit, even if main has moved on"
    assert "is finished: 19,200" in fetch(tmp_path / "out", max_tokens=8000)
    assert_whole(tmp_path / "out")
    # killed before it added anything: the old record is still there, beside the new
    shutil.copy(tmp_path / "out/shards.json", tmp_path / "out/shards.partial.json")
    assert_unfinished(tmp_path / "out")
    fetch(tmp_path / "out")
    assert_whole(tmp_path / "out")


def test_a_lost_or_damaged_shard_is_fetched_again(online, tmp_path):
    requests, _ = online
    fetch(tmp_path / "out")
    (tmp_path / "out" / shard_name(1)).unlink()
    cut = tmp_path / "out" / shard_name(3)
    cut.write_bytes(cut.read_bytes()[:-2])
    requests.clear()
    assert fetch(tmp_path / "out").count("is missing or damaged: fetching it again") == 2
    assert got(requests) == [shard_name(1), shard_name(3)]
    assert_whole(tmp_path / "out")


def test_stopped_at_every_rename_it_goes_on(online, tmp_path, monkeypatch):
    """After each stop the folder does not load as finished, and what is in place does not come again."""
    requests, _ = online
    out, replace, left, stops = tmp_path / "out", os.replace, [0], 0

    def stopping(source, target):
        if os.path.dirname(target) == str(out):
            left[0] -= 1
            if left[0] < 0:
                raise RunFault("stopped")
        replace(source, target)

    monkeypatch.setattr("os.replace", stopping)
    while not (out / "shards.json").exists():
        left[0], here, begun = 2 + stops % 3, files_in(out) if stops else set(), len(requests)
        try:
            fetch(out)
        except RunFault:
            stops += 1
            assert_unfinished(out)
            for thread in threading.enumerate():
                if "(work)" in thread.name:  # a download; in a process that was stopped, none goes on
                    thread.join(10)
        assert not here & set(got(requests[begun:]))
    assert stops > 3
    assert_whole(out)


# -----------------------------------------------------------------------------
# faults


@pytest.mark.parametrize("fault", ["cut", "wrong", pytest.param("500", marks=pytest.mark.slow)])
def test_a_fault_that_passes_costs_time_only(fault, online, tmp_path, capsys):
    requests, faults = online
    faults[shard_name(2)] = [fault]
    fetch(tmp_path / "out")
    assert_whole(tmp_path / "out")
    assert got(requests).count(shard_name(2)) == 2
    if fault == "wrong":
        assert "does not match the Hub's size or SHA-256; trying again" in capsys.readouterr().err


@pytest.mark.slow
def test_large_shards_are_gone_on_with(folder, online, tmp_path, monkeypatch):
    """Cut off in the middle, or with nothing more to come: the rest is asked for, not all again."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 1)
    requests, faults = online
    tokens = np.random.default_rng(0).integers(0, 50_257, 15_000_000, dtype=np.uint16)
    for i, fault in ((1, "cut"), (2, "stall")):
        bin_shard(folder / "datasets" / NAME / shard_name(i), tokens)
        faults[shard_name(i)] = [fault]
    fetch(tmp_path / "out")
    for i in (1, 2):
        assert np.array_equal(open_shard(tmp_path / "out" / shard_name(i)), tokens)
        ranges = [range_ for method, path, range_ in requests if method == "GET" and shard_name(i) in path]
        assert ranges == [None, "bytes=10485760-"]


@pytest.mark.parametrize(
    ("fault", "kind", "message"),
    [
        (
            "wrong",
            RunFault,
            "the download does not match the Hub's size or SHA-256; nothing is lost; run the",
        ),
        ("gated", InputError, "it is gated; accept its conditions on its page, then log in with `hf auth"),
        pytest.param("500", RunFault, "run the same command again to continue", marks=pytest.mark.slow),
        pytest.param("404", InputError, "404", marks=pytest.mark.slow),
    ],
)
def test_a_fault_that_stays_is_one_line(fault, kind, message, online, tmp_path):
    """...and when it is mended, the same command goes on with what is here."""
    requests, faults = online
    faults[shard_name(2)] = [fault] * 9
    said = refusal(tmp_path / "out", kind)
    assert message in said
    assert f"could not fetch {shard_name(2)} from the Hugging Face Hub" in said
    unfinished = {".lock", TEMPORARY, "shards.partial.json", shard_name(0), shard_name(1)}
    assert files_in(tmp_path / "out") == unfinished
    assert_unfinished(tmp_path / "out")
    faults.clear()
    requests.clear()
    assert "2 of them here already" in fetch(tmp_path / "out")
    assert got(requests) == [shard_name(i) for i in (2, 3, 4)]
    assert_whole(tmp_path / "out")


def test_what_is_no_shard_is_refused(folder, online, tmp_path):
    """What the Hub's sums can't tell: the header, the number of tokens, the ids."""
    path = folder / "datasets" / NAME / shard_name(0)
    sound, header = path.read_bytes(), 1024
    refused = {
        "its header is wrong": sound[header:],
        "holds 2,999 tokens, its header says 3,000": sound[:-2],
        "holds 3,001 tokens, its header says 3,000": sound + b"\0\0",
        "empty, cut short or not a token shard": sound[:-1],
        "token 7 is 65535, beyond the 50,257 of the gpt2 encoding": sound[:1038] + b"\xff\xff" + sound[1040:],
    }
    for n, (message, content) in enumerate(refused.items()):
        path.write_bytes(content)
        said = refusal(tmp_path / str(n))
        assert message in said
        assert shard_name(0) in said
        assert files_in(tmp_path / str(n)) == {".lock", TEMPORARY, "shards.partial.json"}
    path.unlink()
    np.save(path.with_suffix(".npy"), tokens_of(0))
    with open(path.with_suffix(".npy"), "ab") as file:
        file.write(b"more")
    assert "4 bytes follow the 3,000 tokens of its header; choose another" in refusal(tmp_path / "npy")


def test_datasets_that_can_not_serve(folder, online, tmp_path):
    files = ["text/train.parquet", "untold/shard_000000.bin", "half/x_train_000001.bin"]
    files += ["both/train_val_000001.bin", "twice/val_0.bin", "twice/data/val_0.bin"]
    for file in files:
        path = folder / "datasets/some" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        bin_shard(path, range(99))
    for dataset, message in (
        ("no/thing", "file list of no/thing at main from the Hugging Face Hub: it does not exist, or it is"),
        ("https://huggingface.co/datasets/some/text", "Repo id must be in the form"),
        ("", "Repo id must"),
        ("some/text", "1 file, but no shard of the val split (a .npy or .bin file with 'val' in its"),
        ("some/untold", "no shard of the val split"),
        ("some/half", "no shard of the val split"),
        ("some/both", "train_val_000001.bin: its name says both 'train' and 'val'"),
        ("some/twice", "data/val_0.bin and val_0.bin would be one file here, or hold the same tokens"),
    ):
        assert message in refusal(tmp_path / "out", shards=dataset)
        assert files_in(tmp_path / "out") == {".lock"}


def test_flags_that_make_no_sense(tmp_path):
    values = {"input": ("x.txt",), "dataset": "a/b", "config": "x", "text_column": "x", "check": tmp_path}
    values |= {"encoding": "bytes", "shard_size": 1000, "workers": 99, "keep_downloads": True}
    for name, value in values.items():
        assert f"--{name} does not go with --shards" in refusal(tmp_path / "out", **{name: value})
    assert "--max_tokens 0: must be at least 1" in refusal(tmp_path / "out", max_tokens=0)
    assert not (tmp_path / "out").exists()


def test_a_folder_in_which_something_else_is(online, tmp_path):
    """Nothing in it is changed."""
    (tmp_path / "file").touch()
    make_shards(tmp_path / "npy", [50, 100])
    (tmp_path / "bin").mkdir()
    bin_shard(tmp_path / "bin/x_val_000000.bin", range(99))
    (tmp_path / "text").mkdir()
    write_texts(["a text"] * 9, tmp_path / "text", 20)
    fetch(tmp_path / "ready", max_tokens=8000)
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun/shards.partial.json").write_bytes((tmp_path / "ready/shards.json").read_bytes())
    (tmp_path / "x.txt").write_text("a word " * 1000)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.[nb]*") if path.is_file()}
    text_job = {"shards": None, "input": (str(tmp_path / "x.txt"),), "shard_size": 500}
    for name, flags, message in (
        ("file", {}, "a file of that name exists"),
        ("npy", {}, "holds shards made elsewhere"),
        ("bin", {}, "holds shards made elsewhere"),
        ("text", {}, f"made with other settings: shards was None, is {NAME}"),
        ("ready", {"shards": "a/b"}, f"shards was {NAME}, is a/b"),
        ("ready", {"revision": "v2"}, "revision was main, is v2"),
        ("ready", text_job, f"made with other settings: shards was {NAME}, is None"),
        ("begun", text_job, f"made with other settings: shards was {NAME}, is None"),
        ("bin", text_job, "holds shards made elsewhere"),
    ):
        assert message in refusal(tmp_path / name, **flags)
    with lock_folder(tmp_path / "ready", "--output_dir"):
        assert "is in use by process" in refusal(tmp_path / "ready")
    assert {path: path.read_bytes() for path in before} == before
    assert_whole(tmp_path / "ready", 2)


def test_the_disk_is_looked_at_before_and_named_when_full(online, tmp_path, monkeypatch):
    usage = type("usage", (), {"free": 1000})
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda _: usage)
        said = refusal(tmp_path / "out")
    assert (
        "needs up to 1 MB of disk space (the shards); 1 MB is free; choose another disk, or set --max_tokens"
        in said
    )
    assert files_in(tmp_path / "out") == {".lock"}

    def full(*_, **__):
        raise OSError(28, "No space left on device", "out/downloads")

    with monkeypatch.context() as patch:
        patch.setattr("huggingface_hub.hf_hub_download", full)
        said = refusal(tmp_path / "out", RunFault)
    assert "No space left on device); free some disk space, then run the same command again" in said
    fetch(tmp_path / "out")
    assert_whole(tmp_path / "out")


@pytest.mark.slow
def test_killed_at_random_moments(folder, tmp_path):
    """SIGKILL, up to twenty times, then the same command once more: all shards, no complete one twice."""
    repository, names = folder / "datasets" / NAME, [shard_name(i) for i in range(30)]
    for i in range(3, 30):
        bin_shard(repository / names[i], np.full(1_000_000, i))
    for path in (repository / "data").iterdir():
        path.unlink()
    expected = {name: sha256(repository / name) for name in names}
    with serve(folder, {name: ["slow"] * 99 for name in names}, stall=0.3) as (env, requests):
        command = "fineweb.py", f"--shards={NAME}", f"--output_dir={tmp_path}/out"
        killed, _ = kill_until_done(command, env, 20, lambda: random.uniform(1.0, 4.0))
    assert {path.name: sha256(path) for path in (tmp_path / "out").glob("*.bin")} == expected
    assert len(load_shards(tmp_path / "out", verify=True).files["train"]) == 29
    assert killed > 3
    assert len(got(requests)) <= 30 + 2 * killed  # at most two downloads are under way


def test_the_two_that_many_use():
    """The names and sizes with which llm.c's and modded-nanogpt's scripts find them."""
    for name, n in (("edu_fineweb", 1001), ("fineweb", 103)):
        listed = [File(".gitattributes", 100), File("README.md", 24), File("airbench94.py", 19_500)]
        listed += [File(f"{name}_train_{i:06d}.bin", 200_001_024) for i in range(n, 0, -1)]
        listed += [File(f"{name}_val_000000.bin", 200_001_024)]
        names = [f"{name}_{'train' if i else 'val'}_{i:06d}.bin" for i in range(n + 1)]
        assert list(choose_shards(NAME, listed, None)) == names
        for max_tokens, taken in ((200_000_000, 2), (200_000_001, 3), (10_000_000_000, 100)):
            assert list(choose_shards(NAME, listed, max_tokens)) == names[:taken]
