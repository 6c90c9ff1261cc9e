"""Text to shards, to the byte."""

import json
from dataclasses import dataclass

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from conftest import ROOT, call, run
from hub import COMMIT, serve

from fineweb import (
    Documents,
    InputError,
    RunFault,
    encode_documents,
    get_encoding,
    run_command,
    sha256,
    write_shards,
)


def stream_of(texts, encoding):
    """The oracle: <|endoftext|> and the document's tokens, for each document."""
    return [token for text in texts for token in (encoding.eot_token, *encoding.encode_ordinary(text))]


def shards_in(folder):
    return [np.load(file) for file in sorted(folder.glob("*.npy"), key=lambda file: file.stem[-6:])]


def write(texts, folder, shard_size, **options):
    """Shard `texts` in three groups of documents."""
    third = max(1, -(-len(texts) // 3))
    groups = [Documents("file", i, texts[i : i + third]) for i in range(0, len(texts), third)]
    return write_shards(groups, folder, shard_size=shard_size, encoding_name="bytes", source={}, **options)


def test_shards_are_the_tutorials_to_the_byte(gpt2_data, gpt2_encoding, tmp_path):
    expected = (gpt2_data / "fineweb_like/expected_shards_10M.sha256").read_text().splitlines()
    files = sorted((gpt2_data / "fineweb_like").glob("*.parquet"))
    done = run("fineweb.py", "--input", *files, "--output_dir", tmp_path / "out", "--shard_size=10000000")
    assert "17,140 documents, 38,099,793 tokens in 4 shards" in done.stdout
    record = json.loads((tmp_path / "out/shards.json").read_text())
    written = {entry["file"]: entry["sha256"] for entry in record["shards"]}
    assert len(expected) == 4
    for line in expected:
        digest, name = line.split()
        assert sha256(tmp_path / "out" / name) == written[name] == digest
    assert record["shards"][-1]["ends_at"]["file"] == files[-1].name
    again = call("fineweb.py", "--input", *files, "--output_dir", tmp_path / "out", "--shard_size=10000000")
    assert "is finished: 38,099,793 tokens" in again.stdout
    other = call(
        "fineweb.py", "--input", *files, "--output_dir", tmp_path / "out", "--shard_size=999", check=False
    )
    assert other.returncode == 2
    assert "was made with settings {'shard_size': 10000000" in other.stderr


TEXTS = ["first", "", "a document that is longer than a shard " * 3, "naïve 東京", "", "last one"]


@pytest.mark.parametrize("shard_size", [2, 7, 50, 148])
def test_the_stream_is_cut_every_shard_size_tokens(shard_size, tmp_path):
    expected = stream_of(TEXTS, get_encoding("bytes"))
    record = write(TEXTS, tmp_path, shard_size)
    shards = shards_in(tmp_path)
    assert all(len(shard) == shard_size for shard in shards[:-1])
    assert all(shard.dtype == np.uint16 for shard in shards)
    assert np.concatenate(shards).tolist() == expected
    assert record["tokens"] == len(expected)
    assert record["documents"] == len(TEXTS)
    assert [entry["tokens"] for entry in record["shards"]] == [len(shard) for shard in shards]
    # where each shard ends: the documents before it, and tokens of the one it cuts
    ends = np.cumsum([len(stream_of([text], get_encoding("bytes"))) for text in TEXTS])
    for n, entry in enumerate(record["shards"], 1):
        position = min(n * shard_size, len(expected))
        document = int(np.searchsorted(ends, position, side="right"))
        before = int(ends[document - 1]) if document else 0
        assert entry["ends_at"] == {"file": "file", "document": document, "token": position - before}


def test_a_shard_may_end_exactly_where_a_document_does(tmp_path):
    write(["abc", "defg", "hijk", "x"], tmp_path, 9)  # 4 + 5 tokens, then 5 + 2
    shards = shards_in(tmp_path)
    assert [len(shard) for shard in shards] == [9, 7]
    assert shards[1][0] == 256
    write(["abc", "defg", "hijk", "lmn"], tmp_path / "", 9)  # 9 + 9: nothing is left over, no empty shard
    assert [len(shard) for shard in shards_in(tmp_path)] == [9, 9]


def test_max_tokens_takes_the_beginning(tmp_path):
    expected = stream_of(TEXTS, get_encoding("bytes"))
    record = write(TEXTS, tmp_path, 20, max_tokens=50)
    assert np.concatenate(shards_in(tmp_path)).tolist() == expected[:50]
    assert [entry["tokens"] for entry in record["shards"]] == [20, 20, 10]


def test_too_little_text_to_train_on_is_refused(tmp_path):
    for shard_size in (10**6, 149):  # 149: the first shard is exactly full
        with pytest.raises(InputError, match=r"149 tokens all fit .* smaller --shard_size, for example 14"):
            write(TEXTS, tmp_path, shard_size)
    with pytest.raises(InputError, match="no document"):
        write([], tmp_path, 10)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_any_number_of_workers_writes_the_same(workers, tmp_path):
    texts = [f"document {i} " * (i % 13) for i in range(1000)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    run(
        "fineweb.py",
        f"--input={tmp_path}/in.jsonl",
        f"--output_dir={tmp_path}/out",
        "--shard_size=10000",
        "--encoding=bytes",
        f"--workers={workers}",
    )
    assert np.concatenate(shards_in(tmp_path / "out")).tolist() == stream_of(texts, get_encoding("bytes"))


def test_text_that_looks_special_is_text(gpt2_encoding):
    texts = ["a<|endoftext|>b", "lone \ud800 surrogate", ""]
    tokens, lengths = encode_documents(gpt2_encoding, texts)
    assert tokens.tolist() == stream_of(texts, gpt2_encoding)
    assert tokens.tolist().count(50256) == 3
    assert lengths.sum() == len(tokens)
    assert gpt2_encoding.decode(tokens.tolist()[1 : lengths[0]]) == texts[0]


def test_the_bytes_encoding_is_bytes():
    encoding = get_encoding("bytes")
    text = "naïve\n\x00東京 <|endoftext|>"
    assert encoding.encode_ordinary(text) == list(text.encode())
    assert encoding.decode(encoding.encode_ordinary(text)) == text
    assert (encoding.n_vocab, encoding.eot_token) == (257, 256)


def test_every_kind_of_input_is_read(tmp_path):
    table = pyarrow.table({"text": ["one", None, "three"], "id": [1, 2, 3]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    (tmp_path / "b.jsonl").write_text('{"text": "four"}\n{"text": "five", "more": 1}\n')
    (tmp_path / "c.txt").write_text("six\nsix")
    run(
        "fineweb.py",
        "--input",
        tmp_path / "a.parquet",
        f"{tmp_path}/[bc].*",
        "--output_dir",
        tmp_path / "out",
        "--shard_size=10",
        "--encoding=bytes",
    )
    expected = stream_of(["one", "", "three", "four", "five", "six\nsix"], get_encoding("bytes"))
    assert np.concatenate(shards_in(tmp_path / "out")).tolist() == expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", '{"text": "a"}\nnonsense\n', r"x.jsonl, line 2: not a JSON object"),
        ("x.jsonl", '{"text": 7}\n', r'x.jsonl, line 1: "text" is int'),
        ("x.parquet", "not parquet at all", "x.parquet: not a sound parquet file"),
        ("x.csv", "a,b", r"x.csv: ends in .csv"),
        ("", "", "no such file"),
    ],
)
def test_bad_input_gets_one_line_and_leaves_nothing(name, content, message, tmp_path):
    if name:
        (tmp_path / name).write_text(content)
    done = call(
        "fineweb.py",
        f"--input={tmp_path / (name or 'nothing.txt')}",
        f"--output_dir={tmp_path}/out",
        "--encoding=bytes",
        "--workers=1",
        "--shard_size=2",
        check=False,
    )
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "out").glob("*"))


def test_a_run_that_did_not_finish_is_not_written_over(tmp_path):
    (tmp_path / "edufineweb_val_000000.npy").write_bytes(b"something")
    done = run(
        "fineweb.py", f"--input={ROOT}/LICENSE", f"--output_dir={tmp_path}", "--encoding=bytes", check=False
    )
    assert done.returncode == 2
    assert "holds shards but no shards.json" in done.stderr
    assert (tmp_path / "edufineweb_val_000000.npy").read_bytes() == b"something"


def test_fineweb_edu_comes_from_the_hub(tmp_path):
    """The default: the sample's parquet files in order, one at a time, at a recorded commit."""
    folder = tmp_path / "hub/datasets/HuggingFaceFW/fineweb-edu/sample/10BT"
    folder.mkdir(parents=True)
    texts = [f"document {i}, taught with care" for i in range(30)]
    for part in (2, 0, 1):
        table = pyarrow.table({"text": texts[10 * part : 10 * part + 10]})
        pyarrow.parquet.write_table(table, folder / f"00{part}_00000.parquet")
    (folder.parent / "10BT_notes.txt").write_text("not data")
    with serve(tmp_path / "hub") as (env, _):
        run("fineweb.py", f"--output_dir={tmp_path}/out", "--shard_size=300", "--encoding=bytes", env=env)
        gone = run(
            "fineweb.py",
            f"--output_dir={tmp_path}/no",
            "--encoding=bytes",
            check=False,
            env={**env, "HF_ENDPOINT": env["HF_ENDPOINT"] + "/elsewhere"},
        )
    assert np.concatenate(shards_in(tmp_path / "out")).tolist() == stream_of(texts, get_encoding("bytes"))
    source = json.loads((tmp_path / "out/shards.json").read_text())["source"]
    assert source == {"dataset": "HuggingFaceFW/fineweb-edu", "folder": "sample/10BT", "revision": COMMIT}
    assert not list((tmp_path / "out").rglob("*.parquet"))
    assert gone.returncode == 2
    assert "could not fetch HuggingFaceFW/fineweb-edu" in gone.stderr


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (InputError("bad flag"), 2),
        (RunFault("disk full"), 1),
        (PermissionError(13, "Permission denied", "log"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_every_end_has_its_status_and_one_line(error, status, monkeypatch, capsys):
    @dataclass(frozen=True)
    class Nothing:
        pass

    def fail(_):
        raise error

    monkeypatch.setattr("sys.argv", ["script.py"])
    with pytest.raises(SystemExit) as end:
        run_command(fail, Nothing)
    assert end.value.code == status
    assert capsys.readouterr().err.count("\n") == 1


def test_without_a_network_the_vocabulary_is_explained(tmp_path):
    done = run(
        "fineweb.py",
        f"--input={ROOT}/LICENSE",
        f"--output_dir={tmp_path}/out",
        check=False,
        env={"TIKTOKEN_CACHE_DIR": str(tmp_path), "HTTPS_PROXY": "http://127.0.0.1:9"},
    )
    assert done.returncode == 2
    assert "TIKTOKEN_CACHE_DIR" in done.stderr
    assert "Traceback" not in done.stderr
