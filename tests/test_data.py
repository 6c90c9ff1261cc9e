"""Shards and the order of tokens: the same windows in every step, whatever the layout."""

import ctypes
import io
import json
import mmap
import os
import shutil
import sys
import time
from collections import Counter
from pathlib import Path

from conftest import make_shards
from support.cli import InputError
from support.data import order
from support.data.shards import load_mix, load_shards
from support.machine import page_cache, processes
from support.machine.processes import World
from support.run.curves import read_event
from train_gpt2 import TokenLoader, TrainConfig

import numpy as np
import pytest
import torch

T = 8


@pytest.fixture
def shards(tmp_path):
    return load_shards(make_shards(tmp_path, [50, 100, 8 * 9 + 1, 75, 5]))


def train_loader(shards, rows=1, world=None, **flags):
    config = TrainConfig(sequence_length=T, total_batch_size=rows * T, **{"seed": 0, **flags})
    return TokenLoader(shards, "train", config, world)


def step_windows(shards, step, world_size, batch_size, rows=12, **options):
    """The inputs of all ranks and micro-steps of one step, in the order of the contract."""
    rows_seen = []
    loaders = [train_loader(shards, rows, World(rank, world_size), **options) for rank in range(world_size)]
    for micro_step in range(rows // (batch_size * world_size)):
        for loader in loaders:
            x, y = loader.batch(step, micro_step, batch_size)
            assert x.shape == y.shape == (batch_size, T)
            assert torch.equal(x[:, 1:], y[:, :-1])
            rows_seen += [tuple(row) for row in torch.cat((x, y[:, -1:]), dim=1).tolist()]
    return rows_seen


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_step_has_the_same_tokens_on_any_layout(shards, shuffle):
    # 12 + 9 + 9 + 0 = 30 windows an epoch, 12 a step: shard edges and epoch edges fall inside steps
    for step in range(8):
        reference = step_windows(shards, step, 1, 12, shuffle=shuffle)
        assert len(reference) == 12
        for world_size, batch_size in ((1, 1), (1, 4), (2, 1), (2, 3), (4, 1), (4, 3)):
            assert step_windows(shards, step, world_size, batch_size, shuffle=shuffle) == reference


def test_an_epoch_visits_every_window_once_and_epochs_differ(shards):
    loader = train_loader(shards, seed=3)
    assert loader.n_windows == 30
    expected = sorted((shard, w * T) for shard, n in enumerate([12, 9, 9, 0]) for w in range(n))
    epochs = [[loader.order.locate(e * 30 + i) for i in range(30)] for e in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == expected
    assert epochs[0] != epochs[1] != epochs[2]
    assert [train_loader(shards, seed=4).order.locate(i) for i in range(30)] != epochs[0]


def test_a_window_never_straddles_shards(shards):
    loader = train_loader(shards, seed=5)
    for i in range(60):
        shard, start = loader.order.locate(i)
        assert start % T == 0
        x, y = loader.windows(i, 1)
        expected = shards.tokens["train"][shard][start : start + T + 1].astype(np.int64)
        assert np.array_equal(torch.cat((x[0], y[0, -1:])).numpy(), expected)


def test_unshuffled_on_one_process_is_the_tutorials_sequence(shards):
    """The tutorial's loader: B * T + 1 tokens at the position, which moves on by B * T."""
    tokens, B = shards.tokens["train"][0].astype(np.int64), 3
    loader = train_loader(shards, 2 * B, shuffle=False)
    batches = loader.batches(0, B)
    for batch in range(4):
        x, y = next(batches)
        buffer = tokens[batch * B * T : (batch + 1) * B * T + 1]
        assert np.array_equal(x.numpy(), buffer[:-1].reshape(B, T))
        assert np.array_equal(y.numpy(), buffer[1:].reshape(B, T))


def test_the_last_window_of_a_shard_has_a_token_after_it(tmp_path):
    """64 tokens hold 8 rows of 8 inputs, but the last one lacks its last target."""
    loader = train_loader(load_shards(make_shards(tmp_path, [50, 64, 65])), shuffle=False)
    assert loader.order.parts[0].windows_per_shard.tolist() == [7, 8]
    x, y = loader.windows(0, loader.n_windows)
    assert x.shape == y.shape == (15, T)


def test_the_loader_has_no_state(shards):
    loader = train_loader(shards, 8, seed=1)
    later = loader.batch(9, 1, 4)[0]
    for step in range(9):
        loader.batch(step, 0, 4)
    assert torch.equal(loader.batch(9, 1, 4)[0], later)
    begun_there = loader.batches(9, 4)
    next(begun_there)
    assert torch.equal(next(begun_there)[0], later)


def test_the_order_is_the_one_of_published_runs(shards):
    """Pins the generator: a run resumed under another version of NumPy must see the same tokens."""
    loader = train_loader(shards, seed=1337)
    assert [loader.order.locate(i) for i in (0, 1, 2, 29, 30, 31)] == [
        (2, 0),
        (0, 64),
        (1, 64),
        (2, 56),
        (2, 48),
        (1, 64),
    ]


@pytest.mark.parametrize("group", [*range(1, 400, 7), 198, 229, 382, 2**31])
def test_windows_are_mixed_within_groups_of_shards(group, monkeypatch):
    """The contract, computed anew: groups of shards in random order; a group's windows in one order."""
    monkeypatch.setattr(order, "GROUP", group)
    lengths, seed = [100, 73, 75, 5, 120, 9], 11
    visited = order.WindowOrder(lengths, T, seed)
    expected = []
    for epoch in range(2):
        groups = [[]]
        for shard in np.random.default_rng((seed, epoch)).permutation(6):
            if groups[-1] and sum(lengths[i] for i in (*groups[-1], shard)) > group:
                groups.append([])
            groups[-1].append(shard)
        for number, shards in enumerate(groups):
            windows = [(i, w * T) for i in shards for w in range((lengths[i] - 1) // T)]
            drawn = np.random.default_rng((seed, epoch, number + 1)).permutation(len(windows))
            expected += [windows[j] for j in drawn]
    assert [visited.locate(i) for i in range(len(expected))] == expected
    assert len(expected) == 2 * visited.n_windows


def test_a_step_holds_windows_of_all_shards(tmp_path):
    """Sixteen shards of one topic each: a step sees them all, where one shard after another gave it one."""
    loader = train_loader(load_shards(make_shards(tmp_path, [50] + [801] * 16)), rows=200)
    for step in range(8):
        assert len({loader.order.locate(200 * step + row)[0] for row in range(200)}) == 16


# ------------------------------------------------------------------ reading ahead


def test_a_group_is_read_ahead_once_in_its_order(tmp_path, monkeypatch):
    """When its first step begins; also by a run that begins in its middle."""
    monkeypatch.setattr(order, "GROUP", 180)
    calls = []
    monkeypatch.setattr(World, "read_ahead", lambda self, files: calls.append([file.name for file in files]))
    shards = load_shards(make_shards(tmp_path, [50, 100, 73, 75, 90]))
    loader = train_loader(shards, rows=3, seed=2)  # 12 + 9 + 9 + 11 windows
    groups = [[shards.files["train"][i].name for i in group] for group, _ in loader.order.parts[0].groups(0)]
    assert [len(group) for group in groups] == [2, 2]
    batches = loader.batches(0, 3)
    for _ in range(13):  # 39 of 41 windows
        next(batches)
    assert calls == groups
    next(train_loader(shards, rows=3, seed=2).batches(12, 3))
    assert calls == [*groups, groups[1]]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("shuffle", [True, False])
def test_the_system_reads_ahead_only_where_that_helps(shuffle, tmp_path):
    """In random order it would read far around each row. "rr" is Linux's flag for random reads."""
    loader = train_loader(load_shards(make_shards(tmp_path, [3000, 3000, 3000])), shuffle=shuffle)
    maps = Path("/proc/self/smaps").read_text().split("VmFlags:")  # the flags follow their mapping
    here = [(i, text) for i, text in enumerate(maps) if f"{tmp_path}/edufineweb_train" in text]
    assert len(here) == len(loader.files) == 2
    assert all(("rr" in maps[i + 1].split("\n")[0].split()) == shuffle for i, _ in here)


def test_files_are_read_within_the_free_memory(tmp_path, monkeypatch):
    """Half of it at most, in order; a file that can't be read is left to those who need it."""
    monkeypatch.setattr(page_cache, "CHUNK", 40)
    files = [tmp_path / name for name in ("a", "missing", "b", "c")]
    for file in (files[0], *files[2:]):
        file.write_bytes(bytes(100))
    sizes = []

    class Opened(io.FileIO):
        def readinto(self, buffer):
            n = super().readinto(buffer)
            sizes.append((Path(self.name).name, n))
            return n

    monkeypatch.setattr(page_cache, "open", lambda file, *_, **__: Opened(file), raising=False)
    for free, expected in ((10**6, {"a": 100, "b": 100, "c": 100}), (300, {"a": 100, "b": 50}), (0, {})):
        monkeypatch.setattr(page_cache, "free_host_memory", lambda free=free: free)
        sizes.clear()
        page_cache.read_into_cache(files).join()
        read = Counter()
        for name, n in sizes:
            read[name] += n
        assert dict(read) == expected
        assert list(dict.fromkeys(name for name, _ in sizes)) == list(expected)


def in_memory(file):
    """The share of a file's pages in the system's page cache, see mincore(2)."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(file, "r+b") as opened, mmap.mmap(opened.fileno(), 0) as mapped:
        pages = (ctypes.c_ubyte * -(-len(mapped) // mmap.PAGESIZE))()
        view = ctypes.c_char.from_buffer(mapped)
        status = libc.mincore(ctypes.c_void_p(ctypes.addressof(view)), ctypes.c_size_t(len(mapped)), pages)
        del view
    assert status == 0
    return sum(page & 1 for page in pages) / len(pages)


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for its page cache")
def test_the_shards_of_a_cold_disk_are_in_memory_before_their_rows_are_asked_for(tmp_path):
    """Otherwise each row is a read of its own from the disk: shards are mapped, and rows lie anywhere."""
    shards = load_shards(make_shards(tmp_path, [10**6, 2 * 10**6, 2 * 10**6]))
    loader = train_loader(shards)
    files = [*shards.files["val"], *loader.files]
    for file in files:
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if max(map(in_memory, files)) > 0.2:
        pytest.skip("this file system keeps its files in memory")
    next(loader.batches(0, 1))
    until = time.monotonic() + 20
    while min(map(in_memory, loader.files)) < 1 and time.monotonic() < until:
        time.sleep(0.05)
    assert [in_memory(file) for file in loader.files] == [1, 1]
    assert in_memory(files[0]) < 0.2  # what no step takes is not read


def test_one_process_of_a_host_reads_ahead(monkeypatch):
    calls = []
    monkeypatch.setattr(processes, "read_into_cache", calls.append)
    for rank, called in (("0", 1), ("1", 1)):
        monkeypatch.setenv("LOCAL_RANK", rank)
        World(8 + int(rank), 16).read_ahead([])
        assert len(calls) == called


# ------------------------------------------------------------------ mixing


def make_mix(tmp_path, *shares):
    """Three data sets, each with a token of its own: 1 in a, 2 in b, 3 in c."""
    folders = []
    for token, n_tokens in enumerate([4 * T + 1, 30 * T + 1, 66 * T + 1], 1):
        folder = tmp_path / "abc"[token - 1]
        if not folder.exists():
            make_shards(folder, [50, n_tokens // 2 + 1, n_tokens // 2 + 1])
            for file in folder.glob("*.npy"):
                np.save(file, np.full_like(np.load(file), token))
        folders.append(folder.with_name(f"{folder.name}:{shares[token - 1]}") if shares else folder)
    return load_mix(folders)


def counts(loader, step, rows):
    """The rows of a step that each data set of `make_mix` has."""
    return np.bincount(loader.windows(step * rows, rows)[0][:, 0], minlength=4)[1:]


def test_data_sets_are_mixed_by_their_shares(tmp_path):
    """Every step has each share, to a row; all steps together have it to a row as well; windows of a small
    data set come again when all were visited; the layout changes nothing."""
    mix, rows, shares = make_mix(tmp_path, 1, 2, 1), 50, np.array([0.25, 0.5, 0.25])
    loader = train_loader(mix, rows)
    total = np.zeros(3)
    for step in range(30):
        n = counts(loader, step, rows)
        assert n.sum() == rows
        assert (abs(n - rows * shares) < 1.001).all()
        total += n
        assert (abs(total - (step + 1) * rows * shares) < 1.001).all()
    assert counts(train_loader(mix, 10), 0, 10).tolist() == [2, 5, 3]  # up to 2.5, 7.5 and 10, rounded down
    assert counts(train_loader(mix, 10), 1, 10).tolist() == [3, 5, 2]
    seen = [loader.order.locate(i) for i in range(30 * rows)]
    for part, (first, n_windows) in enumerate([(0, 4), (2, 30), (4, 66)]):
        mine = [window for window in seen if window[0] - first in (0, 1)]
        assert len(set(mine[:n_windows])) == n_windows, part  # an epoch of each visits every window once
    steps = [step_windows(mix, step, 1, rows, rows) for step in range(3)]
    assert [step_windows(mix, step, 2, 5, rows) for step in range(3)] == steps


def test_without_shares_the_sizes_decide(tmp_path):
    loader = train_loader(make_mix(tmp_path), 100)
    assert counts(loader, 0, 100).tolist() == [4, 30, 66]  # an epoch is one step
    assert counts(loader, 7, 100).tolist() == [4, 30, 66]


def test_a_mix_knows_its_parts(tmp_path):
    mix = make_mix(tmp_path, 1, 2, 1)
    assert mix.names() == ["a", "b", "c"]
    (tmp_path / "b").rename(tmp_path / "b +1")
    (tmp_path / "x").mkdir()
    (tmp_path / "a").rename(tmp_path / "x/b +1")
    named = load_mix([tmp_path / "b +1", tmp_path / "c"])
    assert named.names() == ["b__1", "c"]
    alike = load_mix([tmp_path / "b +1", tmp_path / "x/b +1"]).names()
    assert [read_event(f"0 val_{name} 1.5".encode()) for name in alike] == [
        (0, f"val_{name}", 1.5) for name in alike
    ]
    assert len(set(alike)) == 2
    (tmp_path / "c").rename(tmp_path / "b+ 1")
    one_path = load_mix([tmp_path / "b +1", tmp_path / "b+ 1"]).names()
    assert [name.rpartition("/")[2] for name in one_path] == ["b__1_0", "b__1_1"]
    (tmp_path / "b+ 1").rename(tmp_path / "c")
    (tmp_path / "b +1").rename(tmp_path / "b")
    (tmp_path / "x/b +1").rename(tmp_path / "a")
    assert mix.proportions() == [0.25, 0.5, 0.25]
    fingerprints = {m.fingerprint for m in (mix, make_mix(tmp_path), make_mix(tmp_path, 1, 1, 1))}
    assert len(fingerprints | {part.fingerprint for part in mix.parts}) == 6
    assert make_mix(tmp_path, 2, 4, 2).fingerprint == mix.fingerprint
    assert make_mix(tmp_path).proportions() == pytest.approx([0.04, 0.3, 0.66], abs=0.01)


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (["a:0.5", "b"], "give each of them a share"),
        (["a:0", "b:1"], "above 0"),
        (["a:nan", "b:1"], "above 0"),
        (["a", "a"], "named twice"),
        (["a:1", "a:2"], "named twice"),
        (["a", "nowhere"], "nowhere does not exist"),
        ([], "name folders"),
    ],
)
def test_a_mix_that_can_not_be(folders, message, tmp_path):
    make_mix(tmp_path)
    with pytest.raises(InputError, match=message):
        load_mix([tmp_path / folder for folder in folders])


def test_a_mix_needs_rows_for_every_part(tmp_path):
    with pytest.raises(InputError, match="--total_batch_size"):
        train_loader(make_mix(tmp_path, 1, 98, 1), 100)
    train_loader(make_mix(tmp_path, 2, 96, 2), 100)


def test_a_mix_has_one_encoding(text_shards, tmp_path):
    make_mix(tmp_path)
    with pytest.raises(InputError, match="differ in their encoding"):
        load_mix([tmp_path / "a", text_shards])


def test_llm_c_shards_load(tmp_path):
    header = np.zeros(256, dtype="<i4")
    tokens = np.arange(100, dtype="<u2")
    header[:3] = 20240520, 1, len(tokens)
    for name in ("edu_fineweb_train_000001.bin", "edu_fineweb_val_000000.bin"):
        (tmp_path / name).write_bytes(header.tobytes() + tokens.tobytes())
    shards = load_shards(tmp_path)
    assert np.array_equal(shards.tokens["train"][0], tokens)
    assert shards.encoding == "gpt2"
    (tmp_path / name).write_bytes(header.tobytes() + tokens[:-1].tobytes())
    with pytest.raises(InputError, match="holds 99 tokens, its header says 100"):
        load_shards(tmp_path)


def test_a_shard_belongs_to_the_split_its_name_names_as_a_word(tmp_path):
    folder = make_shards(tmp_path, [50, 100])
    for old, new in (
        ("edufineweb_train_000001", "retrieval_train_1"),
        ("edufineweb_val_000000", "Trainer-Val0"),
    ):
        (folder / f"{old}.npy").rename(folder / f"{new}.npy")
    shards = load_shards(folder)
    assert (shards.count("train"), shards.count("val")) == (100, 50)


BAD_SHARDS = {
    "empty": (lambda file: file.write_bytes(b""), "empty, cut short or not a token shard"),
    "truncated": (
        lambda file: file.write_bytes(file.read_bytes()[:-10]),
        "empty, cut short or not a token shard",
    ),
    "int32": (
        lambda file: np.save(file, np.zeros(99, dtype=np.int32)),
        "1-D int32, a token shard is 1-D uint16",
    ),
    "2-D": (lambda file: np.save(file, np.zeros((9, 9), dtype=np.uint16)), "2-D uint16"),
    "pickled": (lambda file: np.save(file, np.array([{}]), allow_pickle=True), "not a token shard"),
    "text": (lambda file: file.write_text("<html>404</html>" * 20), "not a token shard"),
    "zip": (lambda file: file.write_bytes(b"PK\3\4" * 99), "not a token shard"),
    "header": (lambda file: file.write_bytes(file.read_bytes().replace(b"{'", b"{(")), "not a token shard"),
}


@pytest.mark.parametrize("fault", BAD_SHARDS)
def test_a_bad_shard_is_named(fault, tmp_path):
    folder = make_shards(tmp_path, [50, 100, 100])
    damage, message = BAD_SHARDS[fault]
    damage(folder / "edufineweb_train_000002.npy")
    with pytest.raises(InputError, match=rf"edufineweb_train_000002\.npy: .*{message}"):
        load_shards(folder)


def test_missing_data_is_explained(tmp_path):
    with pytest.raises(InputError, match=r"fineweb\.py.*--demo"):
        load_shards(tmp_path / "nowhere")
    with pytest.raises(InputError, match="no shard of the train split"):
        load_shards(make_shards(tmp_path, [50]))
    folder = make_shards(tmp_path / "short", [50, 5])
    with pytest.raises(InputError, match="no shard of the train split has 9 tokens"):
        train_loader(load_shards(folder))


def test_shards_json_is_held_against_the_files(text_shards, tmp_path):
    folder = shutil.copytree(text_shards, tmp_path / "shards")
    assert load_shards(folder).encoding == "bytes"
    record = json.loads((folder / "shards.json").read_text())
    last = folder / record["shards"][-1]["file"]
    np.save(last, np.load(last)[:-1])
    with pytest.raises(InputError, match=rf"{last.name}: holds .* tokens, shards\.json says"):
        load_shards(folder)
    last.unlink()
    with pytest.raises(InputError, match=rf"{last.name}: missing"):
        load_shards(folder)


def test_the_fingerprint_changes_with_the_data(tmp_path):
    a = load_shards(make_shards(tmp_path / "a", [50, 100])).fingerprint
    assert a == load_shards(make_shards(tmp_path / "b", [50, 100])).fingerprint
    assert a != load_shards(make_shards(tmp_path / "c", [50, 101])).fingerprint


@pytest.mark.parametrize("token", [50_257, 65_535])
def test_a_token_outside_the_vocabulary_is_named(token, tmp_path):
    """Also the first one outside."""
    folder = make_shards(tmp_path, [50, 100])
    file = folder / "edufineweb_train_000001.npy"
    tokens = np.load(file)
    tokens[35] = 50_256  # the last one inside
    np.save(file, tokens)
    loader = train_loader(load_shards(folder))
    assert (loader.windows(0, loader.n_windows)[0] == 50_256).sum() == 1
    tokens[37] = token
    np.save(file, tokens)
    loader = train_loader(load_shards(folder))
    with pytest.raises(InputError, match=rf"edufineweb_train_000001\.npy: token id {token} at offset 37"):
        loader.windows(0, loader.n_windows)
