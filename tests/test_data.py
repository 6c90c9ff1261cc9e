"""Shards and the order of tokens: the same windows in every step, whatever the layout."""

import json
import shutil

from conftest import make_shards
from support.cli import InputError
from support.data.shards import load_shards
from support.machine.processes import World
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
    epochs = [[loader.locate(e * 30 + i) for i in range(30)] for e in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == expected
    assert epochs[0] != epochs[1] != epochs[2]
    assert [train_loader(shards, seed=4).locate(i) for i in range(30)] != epochs[0]


def test_a_window_never_straddles_shards(shards):
    loader = train_loader(shards, seed=5)
    for i in range(60):
        shard, start = loader.locate(i)
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
    assert loader.windows_per_shard.tolist() == [7, 8]
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
    assert [loader.locate(i) for i in (0, 1, 2, 29, 30, 31)] == [
        (2, 40),
        (2, 48),
        (2, 0),
        (1, 56),
        (0, 80),
        (0, 40),
    ]


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
