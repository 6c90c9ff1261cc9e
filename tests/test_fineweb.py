"""Text to shards, to the byte, through kills and a bad line."""

import errno
import gzip
import hashlib
import itertools
import json
import random
import re
import shlex
import signal
import subprocess
import time
from collections import Counter
from dataclasses import dataclass
from unittest.mock import Mock

import fineweb
from conftest import ROOT, bin_shard, call, kill_until_done, make_shards, run, write_texts
from hub import COMMIT, serve
from support.cli import InputError, RunFault, run_command
from support.data import documents
from support.data import hub as hub_module
from support.data.documents import PIECE, File, Piece, Reading, chunks_of, cut_document, local_files
from support.data.encodings import END_OF_TEXT, get_encoding
from support.data.hub import TEMPORARY, Downloads
from support.data.shards import ShardWriter, Stream, load_shards, new_record, read_record, write_shards
from support.data.tokens import encode_piece, encode_task
from support.files import sha256

import huggingface_hub
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

GPT2 = get_encoding("gpt2")


def stream_of(texts, encoding=None):
    """The oracle: <|endoftext|> and the document's tokens, for each document."""
    encoding = encoding or get_encoding("bytes")
    return [token for text in texts for token in (encoding.eot_token, *encoding.encode_ordinary(text))]


def shards_in(folder):
    return [np.load(file) for file in sorted(folder.glob("*.npy"), key=lambda file: file.stem[-6:])]


def tokens_in(folder):
    return np.concatenate(shards_in(folder)).tolist()


def make(out, *flags, **options):
    """fineweb.py in the bytes encoding; returns the finished process."""
    return call("fineweb.py", "--encoding=bytes", f"--output_dir={out}", *flags, **options)


def refusal(out, *flags):
    """The one line with which bad input ends."""
    done = make(out, *flags, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    return done.stderr


@pytest.mark.parametrize("shards", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_shards_are_the_tutorials_to_the_byte(shards, gpt2_data, tmp_path):
    """The whole input is four shards; its first 20 million tokens are two."""
    expected = (gpt2_data / "fineweb_like/expected_shards_10M.sha256").read_text().splitlines()
    files = sorted((gpt2_data / "fineweb_like").glob("*.parquet"))
    command = ("fineweb.py", "--input", *files, "--output_dir", tmp_path / "out", "--shard_size=10000000")
    if shards == 2:
        command = (*command[:-1], "--max_tokens=20000000", command[-1])
    done = run(*command)
    n_tokens = {2: "20,000,000", 4: "38,099,793"}[shards]
    assert f"{n_tokens} tokens in {shards} shards" in done.stdout
    assert re.search(r"the last holds what was left, [\d,]+: that is normal", done.stdout)
    record = json.loads((tmp_path / "out/shards.json").read_text())
    written = {entry["file"]: entry["sha256"] for entry in record["shards"]}
    assert len(written) == shards
    assert len(expected) == 4
    digests = dict(reversed(line.split()) for line in expected)
    for name in written:
        digest = digests[name]
        assert sha256(tmp_path / "out" / name) == written[name] == digest
    if shards == 4:
        assert record["documents"] == 17_140
        assert record["shards"][-1]["ends_at"]["file"] == files[-1].name
    assert f"is finished: {n_tokens} tokens" in call(*command).stdout
    other = call(*command[:-1], "--shard_size=999", check=False)
    assert other.returncode == 2
    assert "made with other settings: shard_size was 10000000, is 999" in other.stderr


TEXTS = ["first", "", "a document that is longer than a shard " * 3, "naïve 東京", "", "last one"]


@pytest.mark.parametrize("shard_size", [2, 7, 50, 148])
def test_the_stream_is_cut_every_shard_size_tokens(shard_size, tmp_path):
    expected = stream_of(TEXTS)
    record = write_texts(TEXTS, tmp_path, shard_size)
    shards = shards_in(tmp_path)
    assert all(len(shard) == shard_size for shard in shards[:-1])
    assert all(shard.dtype == np.uint16 for shard in shards)
    assert tokens_in(tmp_path) == expected
    assert record["tokens"] == len(expected)
    assert record["documents"] == len(TEXTS)
    assert [entry["tokens"] for entry in record["shards"]] == [len(shard) for shard in shards]
    # where each shard ends: the documents before it, and tokens of the one it cuts
    ends = np.cumsum([len(stream_of([text])) for text in TEXTS])
    for n, entry in enumerate(record["shards"], 1):
        position = min(n * shard_size, len(expected))
        document = int(np.searchsorted(ends, position, side="right"))
        before = int(ends[document - 1]) if document else 0
        assert entry["ends_at"] == {"file": "texts", "document": document, "token": position - before}


def test_a_shard_may_end_exactly_where_a_document_does(tmp_path):
    write_texts(["abc", "defg", "hijk", "x"], tmp_path, 9)  # 4 + 5 tokens, then 5 + 2
    shards = shards_in(tmp_path)
    assert [len(shard) for shard in shards] == [9, 7]
    assert shards[1][0] == 256
    write_texts(["abc", "defg", "hijk", "lmn"], tmp_path, 9)  # 9 + 9: nothing is left over, no empty shard
    assert [len(shard) for shard in shards_in(tmp_path)] == [9, 9]


def test_a_document_over_many_shards_is_continued_in_any_of_them(tmp_path, monkeypatch):
    """A job stopped after every single shard, in the middle of one long document that is read in pieces,
    leaves the record of a job never stopped."""
    monkeypatch.setattr(documents, "PIECE", 20)
    texts = ["short", "a document over many shards " * 4, "the end"]

    class Stopped(Exception):
        pass

    def stop(_):
        raise Stopped

    whole = write_texts(texts, tmp_path, 10)
    folder = tmp_path / "again"
    folder.mkdir()
    record = new_record(get_encoding("bytes"), {}, {"shard_size": 10, "max_tokens": None})
    for _ in range(100):
        start = (
            record["shards"][-1]["ends_at"] if record["shards"] else {"file": "", "document": 0, "token": 0}
        )
        pieces = (cut_document("texts", i, texts[i]) for i in range(start["document"], len(texts)))
        try:
            stream = Stream(itertools.chain.from_iterable(pieces), start)
            write_shards([stream], ShardWriter(folder, record, stop))
            break
        except Stopped:
            record = read_record(folder / "shards.partial.json")
    assert record == whole
    assert tokens_in(folder) == stream_of(texts)


def test_lines_of_json_have_their_numbers(tmp_path):
    """Blank lines count, but are not yielded; a file that was written in two parts is read to its end."""
    plain, packed = tmp_path / "x.jsonl", tmp_path / "x.jsonl.gz"
    plain.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\n{"a": "\xff"}\n  \n{}')
    packed.write_bytes(gzip.compress(plain.read_bytes()[:20]) + gzip.compress(plain.read_bytes()[20:]))
    for path in (plain, packed):
        for first in range(6):
            with documents.open_text(path) as (lines, _):
                rows = [(n, documents.row_of(line, "")) for n, line in documents.json_lines(lines, first)]
            assert rows == [row for row in ((0, {"a": 1}), (2, {"a": "\udcff"}), (4, {})) if row[0] >= first]


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_what_was_read_before_is_not_read_again(kind, tmp_path):
    """Nulls before the first document that is wanted do not count a second time."""
    rows = [None, "one", None, None, "four", None]
    path = tmp_path / f"x.{kind}"
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": rows}), path, row_group_size=2)
    else:
        path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    size = path.stat().st_size
    for first in range(7):
        pieces = list(documents.read_documents(File(path.name, size), path, Reading(), first))
        assert [(p.document, p.text) for p in pieces] == [(i, rows[i]) for i in range(first, 6)]
        positions = [piece.position for piece in pieces]
        assert positions == sorted(positions)
        assert positions[-1:] in ([size], [])


def test_the_characters_of_the_special_token_among_plain_documents(tmp_path):
    """Many documents share one call of the tokenizer, which splits them at this very token."""
    texts = ["a", "b<|endoftext|>c", "d"]
    assert write_texts(texts, tmp_path, 6)["remarks"] == {"end_of_text": 1}
    assert tokens_in(tmp_path) == stream_of(texts)


def test_max_tokens_takes_the_beginning(tmp_path):
    record = write_texts(TEXTS, tmp_path, 20, max_tokens=50)
    assert tokens_in(tmp_path) == stream_of(TEXTS)[:50]
    assert [entry["tokens"] for entry in record["shards"]] == [20, 20, 10]
    assert record["documents"] == 2


def test_too_little_text_to_train_on_is_refused(tmp_path):
    for shard_size in (10**6, 149):  # 149: the first shard is exactly full
        with pytest.raises(InputError, match=r"149 tokens all fit .* choose --val_size 74, and train"):
            write_texts(TEXTS, tmp_path, shard_size)
    with pytest.raises(InputError, match="the input holds no text"):
        write_texts([], tmp_path, 10)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("workers", [1, 2, 7])
def test_any_number_of_workers_writes_the_same(workers, tmp_path):
    texts = [f"document {i} " * (i % 130) for i in range(1000)]
    write_texts(texts, tmp_path, 100_000, workers=workers)
    assert tokens_in(tmp_path) == stream_of(texts)


def test_text_that_looks_special_is_text():
    for text, remarks in (
        ("a<|endoftext|>b<|endoftext|>", {"end_of_text": 2}),
        ("lone \ud800 surrogates \udfff", {"replaced": 2}),
        ("", {"empty": 1}),
        ("plain", {}),
    ):
        _, tokens, found = encode_piece(GPT2, Piece("", 0, text))
        assert tokens.tolist() == stream_of([text], GPT2)
        assert found == remarks


@pytest.mark.parametrize("encoding", ["gpt2", "bytes"])
def test_a_long_document_cut_to_pieces_has_the_same_tokens(encoding):
    """The pieces of a long document, tokenized apart, against the document in one piece; on text made to
    confuse: white space of every kind, contractions, digits, scripts, runs."""
    encoding = get_encoding(encoding)
    random.seed(1)
    white = [" ", "  ", "\n", "\n\n", "\t", "\r\n", "\u00a0", "\u2003", "\x1c", "\x85", " " * 50]
    words = ["'s", "'", "don't", "1", "23", "...", "東京", "é", "e\u0301", "😀", "word", "_"]
    words += [END_OF_TEXT, "a" * 50]
    text = "".join(random.choices(white + words, k=350_000))
    pieces = list(cut_document("file", 3, chunks_of(text)))
    assert len(pieces) > 3
    assert max(len(piece.text) for piece in pieces) < 2 * PIECE
    assert [piece.begins for piece in pieces] == [True] + [False] * (len(pieces) - 1)
    assert [piece.ends for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    tokens = np.concatenate([encode_piece(encoding, piece)[1] for piece in pieces])
    assert tokens.tolist() == stream_of([text], encoding)


@pytest.mark.parametrize("white", [" ", "\n", " \t"])
def test_a_million_spaces(white):
    """More white space than tiktoken's pattern can take at once, against what it is by hand: all but the last
    character together, and that one with the word."""
    run = white * (1_200_000 // len(white))
    pieces = list(cut_document("file", 0, chunks_of("begin" + run + "end of it")))
    assert "".join(piece.text for piece in pieces) == "begin" + run + "end of it"
    tokens = np.concatenate([encode_piece(GPT2, piece)[1] for piece in pieces]).tolist()
    by_hand = ["begin", run[:-1], run[-1] + "end of it"]
    assert tokens == [50256] + [token for text in by_hand for token in GPT2.encode_ordinary(text)]


@pytest.mark.parametrize("white", ["\u3000", "\xa0", "\u2028\u00a0"])
def test_a_million_exotic_spaces_are_cut_and_counted(white):
    """tiktoken can't take them at once; cut anywhere, they are the same text."""
    text = "begin" + white * (1_200_000 // len(white)) + "x"
    for encoded in (encode_piece(GPT2, Piece("file", 7, text)), *encode_task(GPT2, [Piece("file", 7, text)])):
        assert GPT2.decode(encoded[1][1:].tolist()) == text
        assert encoded[2]["cut"] > 0


def test_a_long_word_in_a_long_text_is_left_behind():
    """Base64 in a line, say: the text before it and behind it is cut as ever."""
    words = "a word and " * (3 * PIECE // 11)
    text = f"{words[:400]}{'x' * 620_000} {words}{'y' * 300_000} {words}"
    pieces = list(cut_document("file", 0, chunks_of(text)))
    assert "".join(piece.text for piece in pieces) == text
    assert max(len(piece.text) for piece in pieces) < 620_000 + 2 * PIECE
    assert len(pieces) >= 7
    assert not any(piece.cuts_word for piece in pieces)
    assert all(re.match(r"\s\S", piece.text) for piece in pieces[1:])


def test_a_word_without_end_is_cut_and_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "LONGEST_WORD", 600_000)
    text = "x" * 1_100_000
    for begin in ("", "text in front of the word "):
        pieces = list(cut_document("file", 0, chunks_of(begin + text)))
        assert "".join(piece.text for piece in pieces) == begin + text
        cut = [piece.cuts_word for piece in pieces]
        assert cut == [*([False] if begin else []), True, False]
    assert encode_piece(get_encoding("bytes"), pieces[1])[2] == {"cut": 1}


def test_the_bytes_encoding_is_bytes():
    encoding = get_encoding("bytes")
    text = "naïve\n\x00東京 <|endoftext|>"
    assert encoding.encode_ordinary(text) == list(text.encode())
    assert encoding.decode(encoding.encode_ordinary(text)) == text
    assert (encoding.n_vocab, encoding.eot_token) == (257, 256)


def test_every_kind_of_input_is_read(tmp_path):
    """Files, a folder and a glob, each file once; nulls are skipped, bytes that are not UTF-8 replaced, and
    the closing line counts both."""
    source = tmp_path / "in"
    (source / "more/deeper").mkdir(parents=True)
    table = pyarrow.table({"body": ["one", None, "three"], "id": [1, 2, 3]})
    pyarrow.parquet.write_table(table, source / "a.parquet")
    large = pyarrow.array([b"bad \xff byte", b"fine"], pyarrow.large_binary())
    pyarrow.parquet.write_table(pyarrow.table({"body": large}), source / "b.parquet")
    (source / "c.jsonl").write_bytes(
        b'\xef\xbb\xbf{"body": "four"}\n\n{"body": null}\n{"body": "fi\xfeve", "id": 1}\n'
    )
    with gzip.open(source / "more/deeper/d.jsonl.gz", "wt") as file:
        file.write('{"body": "lone \\ud800"}\n{"body": ""}\n{"body": "<|endoftext|>"}')
    (source / "more/e.txt").write_bytes(b"\xef\xbb\xbfsix\r\nsix \x80")
    (source / "more/notes.md").write_text("not read")
    named = source / "a.parquet", f"{source}/?.parquet", f"{source}/**/*.jsonl*", source / "more"
    done = make(tmp_path / "out", "--input", *named, "--shard_size=10", "--text_column=body")
    expected = ["one", "three", "bad \ufffd byte", "fine", "four", "fi\ufffdve"]
    expected += ["lone \ufffd", "", "<|endoftext|>", "six\nsix \ufffd"]
    assert sorted(tokens_in(tmp_path / "out")) == sorted(stream_of(expected))  # in another order
    record = json.loads((tmp_path / "out/shards.json").read_text())
    assert record["documents"] == len(expected)
    assert record["remarks"] == {"null": 2, "replaced": 4, "empty": 1, "end_of_text": 1}
    for remark in (
        "10 documents",
        "null rows skipped: 2 (first ",
        "documents with bytes that are not UTF-8 or with lone surrogates (U+FFFD stands for each): 4",
        "empty documents (only their <|endoftext|> is written): 1",
        "documents that contain the characters <|endoftext|> (kept as text; see --split_at): 1 "
        "(first d.jsonl.gz, document 3: 1 times)",
    ):
        assert remark in done.stdout


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", b'{"text": "a"}\nnonsense\n', r"x.jsonl, line 2: not JSON"),
        ("x.jsonl", b'["text"]\n', r"x.jsonl, line 1: a JSON array; put each object on"),
        ("x.jsonl", b'{"text": 7}\n', r"x.jsonl, line 1: 'text' is int"),
        ("x.jsonl", b'{"body": "a"}\n', r"x.jsonl, line 1: no key 'text' but ['body']; name the one"),
        ("x.jsonl", b"7\n", r"x.jsonl, line 1: not a JSON object"),
        ("x.jsonl", b"[" * 100_000, r"x.jsonl, line 1: a JSON array"),
        ("x.jsonl", b'{"a":' * 100_000, r"x.jsonl, line 1: not JSON"),
        ("x.jsonl.gz", b"not gzip at all", "x.jsonl.gz, line 1: not JSON"),
        # without a time stamp: the name of a test must be the same in every process
        (
            "x.jsonl.gz",
            gzip.compress(b'{"text": "a"}\n' * 99, mtime=0)[:-12],
            "x.jsonl.gz: damaged, it can't be unpacked",
        ),
        ("x.parquet", b"not parquet at all", "x.parquet: not a sound parquet file"),
        ("x.csv", b"a,b", r"x.csv: ends in .csv"),
        ("", b"", "no such file"),
    ],
)
def test_bad_input_gets_one_line(name, content, message, tmp_path):
    if name:
        (tmp_path / name).write_bytes(content)
    assert message in refusal(tmp_path / "out", f"--input={tmp_path / (name or 'nothing.txt')}")
    assert {path.name for path in (tmp_path / "out").glob("*")} <= {".lock", "shards.partial.json"}


def test_a_folder_is_read_but_not_the_shards_in_it(tmp_path):
    """Twice, the second time finished; a file that is named twice is read once; and a job killed right before
    its end does not begin again."""
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(f"the text {name} " * 50)
    out, flags = tmp_path / "out", ("--shard_size=500", "--input", tmp_path)
    make(out, *flags, f"{tmp_path}/../{tmp_path.name}/a.txt")
    names = sorted("abc", key=lambda name: hashlib.sha256(f"{name}.txt".encode()).digest())
    expected = stream_of([f"the text {name} " * 50 for name in names])
    assert tokens_in(out) == expected
    assert "is finished" in make(out, *flags).stdout
    before = (out / "shards.json").read_text()
    (out / "shards.json").rename(out / "shards.partial.json")
    make(out, *flags)
    assert tokens_in(out) == expected
    assert (out / "shards.json").read_text() == before
    wrong_type = before.replace('"tokens": ', '"tokens": "many", "n": ', 1)
    for damaged in ("[" * 100_000, before.replace('"source"', '"sauce"'), "", before[:-9], wrong_type):
        (out / "shards.json").write_text(damaged)
        assert "shards.json: damaged; remove it and the shards beside it" in refusal(out, *flags)
    (out / "shards.json").unlink()
    (out / "shards.partial.json").write_text(before.replace('"ends_at"', '"begins_at"', 1))
    assert "shards.partial.json: damaged; remove it" in refusal(out, *flags)


def test_another_text_file_changes_the_place_of_no_other(tmp_path):
    """The order is that of a hash of each name, in whatever folder."""
    for folder, names in (("one", "abcdefgh"), ("two", "abcdefghi")):
        for name in names:
            (tmp_path / folder).mkdir(exist_ok=True)
            (tmp_path / folder / f"{name}.txt").write_text(name)
    one, two = ([file.name for file in local_files([str(tmp_path / f)])] for f in ("one", "two"))
    assert one == [name for name in two if name != "i.txt"]
    assert one != sorted(one)


def make_groups(tmp_path):
    """Three groups of files: a folder of texts, lines of JSON beside them, and another folder. Every document
    has a letter of its own."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    for i in range(20):
        (tmp_path / f"a/{i}.txt").write_text("x" * 50)
    rows = "".join(json.dumps({"text": "y" * 83}) + "\n" for _ in range(40))
    (tmp_path / "a/rows.jsonl").write_text(rows)
    (tmp_path / "b/one.txt").write_text("z" * 2000)
    return [str(tmp_path / "a"), str(tmp_path / "b")]


def test_the_validation_split_holds_a_part_of_every_group(tmp_path):
    """In proportion to their sizes: 1,000, 4,000 and 2,000 bytes. Nothing is lost, and nothing in both."""
    inputs = make_groups(tmp_path)
    done = make(tmp_path / "out", "--val_size=700", "--shard_size=400", "--input", *inputs)
    shards = load_shards(tmp_path / "out")
    counts = Counter(shards.tokens["val"][0].tolist())
    assert [counts[ord(letter)] for letter in "xyz"] == pytest.approx([100, 400, 200], abs=15)
    everything = Counter(tokens_in(tmp_path / "out"))
    assert [everything[ord(letter)] for letter in "xyz"] == [1000, 40 * 83, 2000]
    assert everything[256] == 61
    record = read_record(tmp_path / "out/shards.json")
    holds = record["shards"][0]["holds"]
    assert (holds["rows.jsonl"], holds["one.txt"], len(holds)) == (5, 1, 4)
    assert record["documents"] == 61
    assert re.search(r"split, 700 tokens or 11\.0% of all, 8 documents of 4 files \(\d+\.txt, ", done.stdout)
    assert "from the text of" not in shards.describe()
    assert shards.describe().startswith("the text of 22 files (")


def test_a_job_with_groups_resumes_after_any_shard(tmp_path, monkeypatch):
    """The bytes and the record of a job never stopped, however often it is."""
    inputs = make_groups(tmp_path)
    flags = ("--val_size=300", "--shard_size=250", "--input", *inputs)
    make(tmp_path / "whole", *flags)
    flags = {"encoding": "bytes", "val_size": 300, "shard_size": 250}
    config = fineweb.ShardConfig(input=tuple(inputs), output_dir=tmp_path / "out", **flags)

    class Stopped(Exception):
        pass

    finish_shard = ShardWriter.finish_shard

    def stop(self):
        finish_shard(self)
        raise Stopped

    stops = 0
    monkeypatch.setattr(ShardWriter, "finish_shard", stop)
    while True:
        try:
            fineweb.main(config)
            break
        except Stopped:
            stops += 1
            if stops == 30:
                monkeypatch.setattr(ShardWriter, "finish_shard", finish_shard)
    assert stops >= 20
    assert tokens_in(tmp_path / "out") == tokens_in(tmp_path / "whole")
    whole = (tmp_path / "whole/shards.json").read_text()
    assert (tmp_path / "out/shards.json").read_text() == whole


def test_the_size_of_a_shard_suits_the_input(tmp_path):
    """Ten shards or more, of a round number of tokens; the tutorial's for FineWeb-Edu."""
    sizes = {3e9: 10**8, 10**9: 10**8, 9.9e8: 5 * 10**7, 3e6: 2 * 10**5, 12_345: 2000, 3600: 1000, 5: 2, 0: 2}
    assert {n: fineweb.choose_shard_size(n) for n in sizes} == sizes
    (tmp_path / "x.txt").write_text("a word " * 3000)
    said = make(tmp_path / "out", f"--input={tmp_path}/x.txt").stdout
    assert "in 11 shards of 2,000" in said
    assert "in 11 shards in" in said
    assert "is finished" in make(tmp_path / "out", f"--input={tmp_path}/x.txt").stdout


def test_a_line_without_the_column_is_found_before_work_begins(tmp_path):
    """Once shards were there, the advice to name the column was refused: "made with other settings"."""
    rows = (json.dumps({"text": "another word " * 9, "body": "a word " * 9}) for _ in range(30_000))
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    (tmp_path / "b.jsonl").write_text('{"body": "a text"}\n')
    said = refusal(tmp_path / "out", f"--input={tmp_path}", "--shard_size=100000")
    assert "b.jsonl, line 1: no key 'text' but ['body']; name the one" in said
    assert not list(tmp_path.glob("out/*.npy"))
    make(tmp_path / "out", f"--input={tmp_path}", "--shard_size=100000", "--text_column=body")


def test_a_full_disk_is_named_and_gone_on_from(tmp_path):
    (tmp_path / "x.txt").write_text("a word " * 9000)
    flags = (
        f"--input={tmp_path}/x.txt",
        f"--output_dir={tmp_path}/out",
        "--encoding=bytes",
        "--shard_size=20000",
    )
    small = "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (30000, -1)); "
    small += "sys.argv[0] = 'fineweb.py'; runpy.run_path('fineweb.py', run_name='__main__')"
    done = run("-c", small, *flags, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert (
        "edufineweb_val_000000.npy could not be written (File too large); allow larger files" in done.stderr
    )
    assert "then run the same command again" in done.stderr
    assert not list((tmp_path / "out").glob("*.tmp"))
    call("fineweb.py", *flags)
    assert tokens_in(tmp_path / "out") == stream_of(["a word " * 9000])


def test_bad_settings_get_one_line(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    pyarrow.parquet.write_table(pyarrow.table({"id": [1, 2]}), tmp_path / "x.parquet")
    for flags, message in (
        (["--shard_size=1"], "--shard_size 1: must be at least 2"),
        (["--workers=0"], "--workers 0: must be at least 1"),
        (["--max_tokens=0"], "--max_tokens 0: must be at least 1"),
        (["--max_tokens=100", "--shard_size=100"], "choose a smaller --val_size"),
        (["--split_at="], "--split_at: name what stands between two documents"),
        (["--input", "a.txt", "--input", "b.txt"], "--input: name one or more files behind one --input"),
        (["--input"], "--input: name one or more files"),
        (["--input", ""], "--input: name one or more files"),
        ([f"--output_dir={tmp_path}/file"], "a file of that name exists"),
        ([f"--input={tmp_path}/folder"], "no documents there; supported are .parquet"),
        ([f"--input={tmp_path}/x.parquet"], "no single column 'text' but ['id']"),
        ([f"--input={tmp_path}/x.parquet", "--text_column=id"], "the column 'id' holds int64, not strings"),
        ([f"--input={ROOT}/LICENSE"], "LICENSE: ends in nothing"),
        (["--write_shards_json"], "goes with --check"),
        (["--check", tmp_path / "nowhere"], "no such folder"),
    ):
        assert message in refusal(tmp_path / "out", *flags)


def test_the_same_files_in_another_order(tmp_path):
    """Files of many documents are another input; whole texts have an order of their own."""
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(f"the text {name} " * 99)
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": f"the text {name} " * 99}))
    for kind in ("txt", "jsonl"):
        files = [tmp_path / f"a.{kind}", tmp_path / f"b.{kind}"]
        make(tmp_path / kind, "--shard_size=700", "--input", *files)
    again = "--shard_size=700", "--input"
    assert "is finished" in make(tmp_path / "txt", *again, tmp_path / "b.txt", tmp_path / "a.txt").stdout
    assert "files differ in" in refusal(tmp_path / "jsonl", *again, *reversed(files))


def test_text_in_the_output_folder_alone_is_no_input(tmp_path):
    """...and does not mean FineWeb-Edu either: nothing is downloaded."""
    (tmp_path / "x.txt").write_text("a word " * 1000)
    assert "all in --output_dir, which is left out" in refusal(tmp_path, f"--input={tmp_path}")
    for _ in range(2):  # what is named is read, wherever it lies, but for the shards and their record
        found = [str(path) for path in tmp_path.iterdir() if path.suffix in (".txt", ".json", ".npy")]
        done = make(tmp_path, "--shard_size=700", "--input", *found)
    assert len(found) > 3
    assert "is finished" in done.stdout


def test_a_disk_too_small_is_refused_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "x.txt").write_text("a word " * 1000)
    usage = type("usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    said = refusal(tmp_path / "out", f"--input={tmp_path}/x.txt")
    assert "needs up to 1 MB of disk space (the shards); 1 MB is free; choose another disk, or set" in said
    monkeypatch.undo()
    said = refusal(tmp_path / "out", f"--input={tmp_path}/x.txt", "--shard_size=1000000000000000")
    assert "--shard_size 1000000000000000: a shard is built in memory" in said


def test_the_systems_errors_are_not_damage(tmp_path, monkeypatch, capsys):
    """No lock, no permission, no more open files: the shards are sound, and stay."""
    (tmp_path / "x.txt").write_text("a word " * 1000)
    flags = f"--input={tmp_path}/x.txt", "--shard_size=700"
    make(tmp_path / "out", *flags)
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr("fcntl.flock", Mock(side_effect=OSError(38, "Function not implemented")))
        done = make(tmp_path / "out", *flags)
        assert f"note: {tmp_path}/out can't be locked (Function not implemented); use it for" in done.stdout
        assert "is finished" in done.stdout
    with monkeypatch.context() as patch:
        patch.setattr(np.lib.format, "open_memmap", Mock(side_effect=OSError(24, "Too many open files", "x")))
        done = make(tmp_path / "out", *flags, check=False)
        assert (done.returncode, done.stderr) == (
            1,
            f"error: {tmp_path}/out/edufineweb_val_000000.npy: Too many open files; allow more open files "
            "(ulimit -n)\n",
        )
    assert {path: path.read_bytes() for path in before} == before


def test_the_disk_that_a_job_needs(tmp_path, monkeypatch):
    """By hand: 10 GB of parquet files hold 16 GB of text; a token of a byte takes two; the two largest
    downloads take 7 GB."""
    monkeypatch.setattr("shutil.disk_usage", lambda _: Mock(free=10**12))
    files = [File(f"{i}.parquet", size * 10**9) for i, size in enumerate((3, 1, 4, 2))]
    for flags, n_tokens, expected in (
        ({}, 0, "about 16,000,000,000 tokens in 160 shards of 100,000,000; needs up to 39.0 GB"),
        ({}, 6 * 10**9, "160 shards of 100,000,000; needs up to 27.0 GB"),
        ({"keep_downloads": True}, 0, "needs up to 42.0 GB of disk space (all downloads and the shards)"),
        ({"max_tokens": 10**9}, 0, "about 1,000,000,000 tokens in 10 shards of 100,000,000; needs up to 9"),
        ({"encoding": "gpt2"}, 0, "about 3,636,363,636 tokens in 37 shards of 100,000,000; needs up to 14"),
    ):
        config = fineweb.ShardConfig(**{"encoding": "bytes", "output_dir": tmp_path, **flags})
        assert expected in fineweb.size_of_job(config, files, 10**8, n_tokens)
    config = fineweb.ShardConfig(encoding="bytes", output_dir=tmp_path)
    assert "needs up to 22.0 GB" in fineweb.size_of_job(config, files, 10**8, 6 * 10**9, 5 * 10**9)
    assert "needs up to 20.0 GB" in fineweb.size_of_job(config, files, 10**8, 6 * 10**9, 9 * 10**9)
    monkeypatch.setattr("shutil.disk_usage", lambda _: Mock(free=10**10))
    for n_tokens, remedy in ((0, "choose another disk, or set --max_tokens"), (6 * 10**9, "make room, or")):
        with pytest.raises(InputError, match=f"10.0 GB is free; {remedy}"):
            fineweb.size_of_job(config, files, 10**8, n_tokens)


def test_what_there_is_of_an_unfinished_job_can_be_used(tmp_path):
    """By the command that the message names: with the encoding in the record."""
    (tmp_path / "x.txt").write_text("a word " * 1000)
    make(tmp_path / "out", f"--input={tmp_path}/x.txt", "--encoding=bytes", "--shard_size=700")
    (tmp_path / "out/shards.json").rename(tmp_path / "out/shards.partial.json")
    with pytest.raises(InputError, match=r"to use what there is .*: mv ") as said:
        load_shards(tmp_path / "out")
    subprocess.run(shlex.split(str(said.value).partition("move it back): ")[2]), check=True)
    assert load_shards(tmp_path / "out").encoding == "bytes"


def test_shards_made_elsewhere_are_not_written_over(tmp_path):
    make_shards(tmp_path, [50, 100])
    before = {path: sha256(path) for path in tmp_path.glob("*.npy")}
    (tmp_path / "x.txt").write_text("a word " * 1000)
    said = refusal(tmp_path, f"--input={tmp_path}/x.txt")
    assert "made elsewhere, of which there is no record" in said
    assert {path: sha256(path) for path in tmp_path.glob("*.npy")} == before


# -----------------------------------------------------------------------------
# killed and run again


@pytest.mark.slow
def test_killed_after_every_shard_it_ends_the_same(tmp_path):
    """SIGKILL right after each flush to disk, in the process that writes; no piece of work is lost or done
    twice."""
    texts = [None if i % 7 == 3 else f"document {i} " * (i % 40) for i in range(300)]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    out = tmp_path / "out"
    command = f"--input={tmp_path}/x.jsonl", "--shard_size=16000", "--workers=1"
    make(tmp_path / "undisturbed", *command)
    expected = {path.name: path.read_bytes() for path in (tmp_path / "undisturbed").iterdir() if path.suffix}
    assert len(expected) == 5
    killer = (
        "import os, runpy, signal, sys\n"
        "left, replace = [int(sys.argv.pop(1))], os.replace\n"
        "def killing(*names):\n"
        "    left[0] -= 1\n"
        "    if left[0] == 0: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    replace(*names)\n"
        "    if left[0] == 1: os.kill(os.getpid(), signal.SIGKILL)\n"
        "os.replace = killing\n"
        "sys.argv[0] = 'fineweb.py'\n"
        "runpy.run_path('fineweb.py', run_name='__main__')\n"
    )
    kills = 0
    while True:
        arguments = *command, "--encoding=bytes", f"--output_dir={out}"
        done = run("-c", killer, 2 + kills % 3, *arguments, check=False)
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL, done.stderr
        kills += 1
        if (out / "shards.partial.json").exists():
            with pytest.raises(InputError, match="is not finished: run the same"):
                load_shards(out)
    assert kills > 3
    (out / ".lock").unlink()
    assert {path.name: path.read_bytes() for path in out.iterdir()} == expected
    # a finished job that lost a shard goes on there, too, but not with other settings or another input
    (out / "edufineweb_train_000002.npy").unlink()
    assert "max_tokens was None, is 20000" in refusal(out, *command, "--max_tokens=20000")
    (tmp_path / "y.txt").touch()
    other = refusal(out, "--shard_size=16000", "--input", tmp_path / "x.jsonl", tmp_path / "y.txt")
    assert "made with other settings: files differ in ['y.txt', 0]; choose" in other
    assert "resuming after 2 finished shards" in make(out, *command).stdout
    (out / ".lock").unlink()
    assert {path.name: path.read_bytes() for path in out.iterdir()} == expected


@pytest.mark.slow
def test_thirty_random_kills(gpt2_data, tmp_path):
    """The real files from a Hub, 1 million tokens a shard, SIGKILL at thirty random moments: the bytes of a
    job that was not killed, and nothing that was complete is downloaded again."""
    real = f"--input={gpt2_data}/fineweb_like"
    call("fineweb.py", real, f"--output_dir={tmp_path}/undisturbed", "--shard_size=1000000")
    folder = tmp_path / "hub/datasets/HuggingFaceFW/fineweb-edu/sample/10BT"
    folder.mkdir(parents=True)
    for file in (gpt2_data / "fineweb_like").glob("*.parquet"):
        (folder / file.name).symlink_to(file)
    (folder.parent.parent / "README.md").write_text(CARD)
    (folder.parent.parent / "data").mkdir()
    (folder.parent.parent / "data/train.txt").write_text("not asked for")
    with serve(tmp_path / "hub") as (env, requests):
        command = "fineweb.py", f"--output_dir={tmp_path}/out", "--shard_size=1000000"
        killed, out = kill_until_done(command, env, 30, lambda: random.uniform(0.5, 2.2))
    downloads = [request for request in requests if request[0] == "GET" and request[1].endswith(".parquet")]
    expected = {path.name: sha256(path) for path in (tmp_path / "undisturbed").glob("*.npy")}
    assert len(expected) == 39
    assert {path.name: sha256(path) for path in (tmp_path / "out").glob("*.npy")} == expected
    records = [(tmp_path / name / "shards.json").read_text() for name in ("undisturbed", "out")]
    assert json.loads(records[0])["shards"] == json.loads(records[1].replace("sample/10BT/", ""))["shards"]
    print(f"{killed} kills, {len(downloads)} downloads: {out.splitlines()[-1]}")
    assert killed > 20  # a fast machine is done before the last ones
    assert len([range_ for _, _, range_ in downloads if range_ is None]) <= 2 + killed // 10


# -----------------------------------------------------------------------------
# the Hub

CARD = """---
configs:
- config_name: default
  data_files:
  - split: train
    path: data/*
- config_name: sample-10BT
  data_files:
  - split: train
    path: sample/10BT/*
- config_name: held-out
  data_files:
  - split: test
    path: data/*
---
"""


# fineweb.py that hands out small tasks, and does not wait before it asks the Hub again
IMPATIENT = """
import fineweb
from support.data import documents
from support.data import hub
from support.data import tokens
documents.PIECE = tokens.TASK = 1000
hub.RETRY_AFTER = (0, 0)
fineweb.run_command(fineweb.main, fineweb.ShardConfig)
"""


@pytest.fixture
def hub(tmp_path):
    """A folder to serve, with a FineWeb-Edu of three small parquet files, and their texts."""
    folder = tmp_path / "hub/datasets/HuggingFaceFW/fineweb-edu"
    (folder / "sample/10BT").mkdir(parents=True)
    (folder / "data").mkdir()
    texts = [f"document {i}, taught with care " * 9 for i in range(300)]
    for part in (2, 0, 1):
        table = pyarrow.table({"text": texts[100 * part : 100 * part + 100]})
        pyarrow.parquet.write_table(table, folder / f"sample/10BT/00{part}_00000.parquet", compression="none")
    pyarrow.parquet.write_table(pyarrow.table({"text": texts[:50]}), folder / "data/train.parquet")
    (folder / "README.md").write_text(CARD)
    return tmp_path / "hub", texts


def downloads_of(requests, name):
    return [request for request in requests if request[0] == "GET" and request[1].endswith(name)]


def test_fineweb_edu_comes_from_the_hub(hub, tmp_path):
    """The default: the sample's parquet files in the order that `datasets` gives, at one recorded commit,
    each deleted when its shards are safe."""
    folder, texts = hub
    command = "fineweb.py", "--shard_size=5000", "--encoding=bytes"
    own = [tmp_path / "out/downloads" / name for name in ("mine.txt", "mine.incomplete")]
    own[0].parent.mkdir(parents=True)
    for path in own:
        path.touch()
    with serve(folder) as (env, requests):
        done = run(*command, f"--output_dir={tmp_path}/out", env=env)
        asked = len(requests)
        again = run(*command, f"--output_dir={tmp_path}/out", env=env)
        assert len(requests) == asked
        other = run(*command, f"--output_dir={tmp_path}/out", "--config=sample-100BT", env=env, check=False)
        kept = run(*command, f"--output_dir={tmp_path}/kept", "--config=default", "--keep_downloads", env=env)
    assert f"HuggingFaceFW/fineweb-edu sample-10BT at {COMMIT[:8]}: 3 files" in done.stdout
    assert "(two downloads and the shards)" in done.stdout
    assert tokens_in(tmp_path / "out") == stream_of(texts)
    source = json.loads((tmp_path / "out/shards.json").read_text())["source"]
    assert source == {"dataset": "HuggingFaceFW/fineweb-edu", "config": "sample-10BT", "revision": COMMIT}
    assert not (tmp_path / "out" / TEMPORARY).exists()
    assert all(path.exists() for path in own)  # a folder of one's own called downloads
    assert "is finished" in again.stdout
    assert other.returncode == 2
    assert "config was sample-10BT, is sample-100BT" in other.stderr
    assert "1 file," in kept.stdout
    assert tokens_in(tmp_path / "kept") == stream_of(texts[:50])
    assert (tmp_path / "kept/downloads/data/train.parquet").exists()


def test_another_dataset_from_the_hub(tmp_path):
    """One without a card, its text in another column, as JSON lines."""
    folder = tmp_path / "hub/datasets/someone/poems/data"
    folder.mkdir(parents=True)
    texts = [f"poem {i}" * 20 for i in range(50)]
    with gzip.open(folder / "train-00000-of-00001.jsonl.gz", "wt") as file:
        file.write("".join(json.dumps({"poem": text}) + "\n" for text in texts))
    flags = "--dataset=someone/poems", "--text_column=poem", "--shard_size=2000", "--encoding=bytes"
    with serve(tmp_path / "hub") as (env, _):
        run("fineweb.py", *flags, f"--output_dir={tmp_path}/out", env=env)
    assert tokens_in(tmp_path / "out") == stream_of(texts)


def test_off_a_terminal_progress_is_plain_lines(tmp_path, monkeypatch):
    (tmp_path / "x.jsonl").write_text((json.dumps({"text": "a word " * 500}) + "\n") * 200)
    started, clock = time.monotonic(), time.monotonic
    monkeypatch.setattr("time.monotonic", lambda: started + 10_000 * (clock() - started))
    done = make(tmp_path / "out", f"--input={tmp_path}/x.jsonl", "--shard_size=100000")
    line = r"[\d.]+k of about (\d+)k tokens \| \S+ tokens/s \| \d+:\d+ left, shard \d, x.jsonl"
    assert int(re.findall(line, done.stdout)[-1]) == pytest.approx(700, rel=0.1)
    assert "\r" not in done.stderr
    # by hand: 10 tokens in half of the input, after 5 of an earlier job
    files, record = [File("a", 100), File("b", 300)], {"tokens": 5, "shards": []}
    for limit, total in ((None, 30), (25, 25)):
        progress = fineweb.TokenProgress(files, limit, record)
        progress.on_piece(10, Piece("b", 0, "", position=100))
        assert progress.bar.total == total


@pytest.mark.slow
def test_what_the_hub_does_not_have(hub, tmp_path):
    folder, _ = hub
    with serve(folder) as (env, _):
        for flags, message in (
            (["--config=nothing"], "BuilderConfig 'nothing' not found. Available: ['default', 'sample-10BT'"),
            (["--config=held-out"], "no train split, only test"),
            (["--dataset=no/thing"], "could not fetch the file list of no/thing"),
        ):
            done = run("fineweb.py", f"--output_dir={tmp_path}/out", *flags, env=env, check=False)
            assert done.returncode == 2
            assert message in done.stderr.splitlines()[-1]
            assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_bad_line_costs_time_and_nothing_else(hub, tmp_path):
    """A connection cut in the middle, a server in trouble, a stall and a wrong byte, all met by one job: it
    ends with the right shards, and what was cut is gone on with where huggingface_hub can."""
    folder, texts = hub
    names = [f"00{part}_00000.parquet" for part in range(3)]
    faults = dict(zip(names, (["cut", "500"], ["stall"], ["wrong"]), strict=True))
    for name in names[:2]:  # more than huggingface_hub keeps in memory: 10 MB
        (file,) = folder.rglob(name)
        padding = pyarrow.array([random.randbytes(250_000) for _ in range(100)])
        table = pyarrow.parquet.read_table(file).append_column("padding", padding)
        pyarrow.parquet.write_table(table, file, compression="none")
    with serve(folder, faults) as (env, requests):
        flags = f"--output_dir={tmp_path}/out", "--shard_size=5000", "--encoding=bytes"
        done = run("fineweb.py", *flags, env={**env, "HF_HUB_DOWNLOAD_TIMEOUT": "1"})
    assert tokens_in(tmp_path / "out") == stream_of(texts)
    ranges = {name: [range_ for _, _, range_ in downloads_of(requests, name)] for name in faults}
    go_on = "bytes=10485760-"
    assert list(ranges.values()) == [[None, go_on, None], [None, go_on], [None, None]]
    assert "the download does not match the Hub's size or SHA-256; trying again in 1 s" in done.stderr


@pytest.mark.parametrize(
    ("fault", "status", "message"),
    [
        ("500", 1, "run the same command again"),
        pytest.param("404", 2, "404", marks=pytest.mark.slow),
        ("wrong", 1, "SHA-256"),
    ],
)
def test_a_line_that_stays_bad_ends_with_one(fault, status, message, hub, tmp_path):
    """...and the same command goes on when it is mended, with what was finished before."""
    folder, texts = hub
    arguments = f"--output_dir={tmp_path}/out", "--shard_size=5000", "--encoding=bytes", "--workers=1"
    with serve(folder, {"002_00000.parquet": [fault] * (1 if fault == "404" else 3)}) as (env, requests):
        done = run("-c", IMPATIENT, *arguments, env=env, check=False)
        assert done.returncode == status
        assert message in done.stderr.splitlines()[-1]
        assert "Traceback" not in done.stderr
        assert not list((tmp_path / "out").glob("*.tmp"))
        finished = {path: sha256(path) for path in (tmp_path / "out").glob("*.npy")}
        assert finished
        done = run("fineweb.py", *arguments, env=env)
    assert f"resuming after {len(finished)} finished shards" in done.stdout
    assert {path: sha256(path) for path in finished} == finished
    assert tokens_in(tmp_path / "out") == stream_of(texts)
    assert len(downloads_of(requests, "000_00000.parquet")) == 1


@pytest.mark.parametrize(
    ("make_error", "message"),
    [
        (lambda: json.loads("<html>Log in</html>"), "its answer is not the Hub's"),
        (lambda: huggingface_hub.hf_api.RepoFile(**{"oid": "x"}), "its answer is not the Hub's"),
    ],
)
def test_a_page_that_is_not_the_hubs_is_one_line(make_error, message):
    """A login portal answers in HTML, a mirror in another form."""
    message = f"could not fetch the list from the Hugging Face Hub: {message}"
    with pytest.raises(RunFault, match=message), hub_module.hub_errors("the list"):
        make_error()


def test_a_mistake_here_is_not_blamed_on_the_hub():
    with pytest.raises(KeyError), hub_module.hub_errors("the list"):
        {}["name"]
    with pytest.raises(RuntimeError, match="no task"), hub_module.hub_errors("the list"):
        raise RuntimeError("no task")


def test_a_failed_task_of_the_library_in_rust_is_a_failed_download():
    """hf_xet, which loads most files, has a RuntimeError for it; its caller's line is the innermost."""
    source = "def xet_get():\n    next(iter(()), None) or (_ for _ in ()).throw(ERROR)\n"
    names = {"__name__": "huggingface_hub.file_download", "ERROR": RuntimeError("Task error: Network error")}
    exec(source, names)
    message = r"could not fetch the file from the Hugging Face Hub: Task error: Network error"
    with pytest.raises(RunFault, match=message), hub_module.hub_errors("the file"):
        names["xet_get"]()


def read_and_fail(texts):
    for i, text in enumerate(texts):
        yield Piece("texts", i, text)
    raise InputError("a bad line")


@pytest.mark.parametrize("workers", [1, 8])
def test_a_fault_behind_the_last_wanted_token_does_not_matter(workers, tmp_path):
    """...nor in another group of files. And all that comes before a fault is in the shards."""
    texts = ["some text "] * 100
    settings = {"shard_size": 50, "val_size": 50, "max_tokens": 400}
    writer = ShardWriter(tmp_path, new_record(get_encoding("bytes"), {}, settings))
    record = write_shards([Stream(read_and_fail(texts)), Stream(read_and_fail([]))], writer, workers)
    assert tokens_in(tmp_path) == stream_of(texts)[:400]
    assert record["shards"][-1]["ends_at"]["document"] == 400 // 11
    (tmp_path / "all").mkdir()
    writer = ShardWriter(
        tmp_path / "all", new_record(get_encoding("bytes"), {}, settings | {"max_tokens": None})
    )
    with pytest.raises(InputError, match="a bad line"):
        write_shards([Stream(read_and_fail(texts))], writer, workers)
    assert [shard["tokens"] for shard in writer.record["shards"]] == [50] * (
        1100 // 50 - 1
    )  # the last waits for its end


def test_a_trial_downloads_only_what_it_needs(hub, tmp_path):
    folder, texts = hub
    with serve(folder) as (env, requests):
        flags = f"--output_dir={tmp_path}/out", "--shard_size=5000", "--encoding=bytes", "--workers=1"
        run("-c", IMPATIENT, *flags, "--max_tokens=12000", env=env)
    assert tokens_in(tmp_path / "out") == stream_of(texts)[:12000]
    assert downloads_of(requests, "000_00000.parquet")
    assert not downloads_of(requests, "001_00000.parquet")


# What an earlier process has downloaded, or why it is not there; whoever waits for a network fails.
FETCH = """
import time
import datasets
import os
from support.cli import RunFault
from support.data import hub
from support.data.hub import hub_or_disk, model_files
hub.PATIENCE = float(os.environ.get("PATIENCE", 5))
def rows():
    return hub_or_disk("the rows", lambda: datasets.load_dataset("some/rows", split="train"))["text"][0]
def weights():
    return model_files("some/model", "the model")[1].read_text()
def fail(_):
    raise AssertionError("waits for the network")
time.sleep = fail
for fetch in (rows, weights):
    try:
        print(fetch())
    except RunFault as fault:
        print(fault)
"""


@pytest.mark.slow
def test_without_a_network_the_disk_serves(tmp_path):
    """...at once; and what is not there is refused at once, in one line each. A Hub that answers late is no
    Hub that does not answer."""
    for name, text in (
        ("datasets/some/rows/data/train.jsonl", '{"text": "a row"}'),
        ("models/some/model/config.json", "{}"),
        ("models/some/model/model.safetensors", "weights"),
    ):
        (tmp_path / "hub" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "hub" / name).write_text(text)
    with serve(tmp_path / "hub", delay=0.3) as (env, _):
        assert run("-c", FETCH, env={**env, "PATIENCE": "0.1"}).stdout == "a row\nweights\n"
    assert run("-c", FETCH, env=env).stdout == "a row\nweights\n"
    lines = run("-c", FETCH, env={**env, "HF_HOME": str(tmp_path / "empty")}).stdout.splitlines()
    reason = f"{env['HF_ENDPOINT']} can't be reached, and no earlier download is on this disk"
    assert lines == [f"could not fetch the rows: {reason}", f"could not fetch the model: {reason}"]


@pytest.fixture
def no_waiting(monkeypatch):
    monkeypatch.setattr(time, "sleep", Mock(side_effect=AssertionError("waits")))


def test_an_offline_mode_is_a_choice(no_waiting, monkeypatch):
    """No attempt is repeated, and the line names the variable."""
    from datasets import load_dataset

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    for fetch in (
        lambda: hub_module.dataset_files("some/rows", None, "main"),
        lambda: hub_module.repository_files("some/rows", "main"),
        lambda: hub_module.model_files("some/model-that-is-not-here", "the model"),
        lambda: hub_module.hub_or_disk("rows", lambda: load_dataset("some/rows-that-are-not-here")),
    ):
        with pytest.raises(InputError, match="HF_HUB_OFFLINE is set, and no earlier download") as caught:
            fetch()
        assert "\n" not in str(caught.value)


def test_rows_that_datasets_has_cached_are_no_answer_of_the_hub(monkeypatch, tmp_path):
    """Without the Hub, `datasets` takes rows that an earlier load_dataset has cached; they name no files."""
    (tmp_path / "some___rows/default/0.0.0/abc").mkdir(parents=True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path))
    monkeypatch.setattr(hub_module, "RETRY_AFTER", ())

    def no_network(*_, **__):
        raise ConnectionError("no route to the Hub")

    monkeypatch.setattr("huggingface_hub.HfApi.hf_hub_download", no_network)
    with pytest.raises(RunFault, match="no route to the Hub"):
        hub_module.dataset_files("some/rows", None, "main")


@pytest.mark.parametrize("name", ["ENOSPC", "EDQUOT", "EACCES", "EROFS", "EMFILE", "EIO"])
def test_what_this_machine_does_is_no_fault_of_the_hub(name, no_waiting, monkeypatch, tmp_path):
    """Nothing is tried again; the reason stays what it is."""
    error = OSError(getattr(errno, name), "the reason", "a/cache")
    in_rust = RuntimeError(f"I/O error: the reason (os error {getattr(errno, name)})")
    for of_this_disk in (error, in_rust):
        with pytest.raises(OSError, match="the reason"):
            hub_module.retried("a file", Mock(side_effect=of_this_disk))
    monkeypatch.setattr(hub_module, "hub_answers", lambda: True)
    with pytest.raises(RunFault, match=r"could not fetch a file \(a/cache: the reason\); ") as caught:
        hub_module.hub_or_disk("a file", Mock(side_effect=error))
    assert ("free some disk space" in str(caught.value)) == (name in ("ENOSPC", "EDQUOT"))


@pytest.mark.parametrize(
    ("answers", "calls", "outcome"),
    [
        (True, [False], "fetched"),
        (None, [True, False], "fetched"),  # late: this disk first, then the library decides
        (False, [True], "can't be reached, and no earlier download is on this disk"),
    ],
)
def test_a_probe_never_overrules_the_library(answers, calls, outcome, monkeypatch):
    from huggingface_hub import constants

    made = []

    def fetch():
        made.append(constants.HF_HUB_OFFLINE)
        if constants.HF_HUB_OFFLINE:
            raise ConnectionError("OfflineModeIsEnabled")
        return "fetched"

    monkeypatch.setattr(hub_module, "hub_answers", lambda: answers)
    try:
        said = hub_module.hub_or_disk("a file", fetch)
    except RunFault as fault:
        said = str(fault)
    assert said.endswith(outcome)
    assert (made, constants.HF_HUB_OFFLINE) == (calls, False)


def test_the_next_file_comes_while_this_one_is_read(tmp_path):
    """At most two files are on the disk, and the second one is started before the first is read."""
    files = [File(f"{i}.txt", 6) for i in range(4)]
    downloads = Downloads("", "", files, tmp_path, keep=False, ahead=True)
    downloads.folder.mkdir()
    fetched = []

    def fetch(file):
        (downloads.folder / file.name).write_text("a text")
        fetched.append(file.name)
        return downloads.folder / file.name

    downloads.fetch = fetch
    for piece in fineweb.read_files(
        files, Reading(), {"file": "0.txt", "document": 0, "token": 0}, downloads
    ):
        time.sleep(0.1)
        i = int(piece.file[0])
        present = sorted(path.name for path in downloads.folder.iterdir())
        assert present == [f"{j}.txt" for j in (i - 1, i) if j >= 0] if i else ["0.txt", "1.txt"]
        downloads.drop_before(piece.file)
        time.sleep(0.1)
        present = sorted(path.name for path in downloads.folder.iterdir())
        assert present == [f"{j}.txt" for j in (i, i + 1) if j < 4]
    assert fetched == [file.name for file in files]


# -----------------------------------------------------------------------------
# shards from elsewhere, and the way every script ends


def test_check_tells_what_a_folder_holds(text_shards, tmp_path, capsys):
    known = call("fineweb.py", "--check", text_shards)  # in gpt2, were it not for shards.json
    assert "bytes encoding (as shards.json says)" in known.stdout
    assert re.search(r"val +20,000 tokens in +1 shard, beginning '<.endoftext.>0 green", known.stdout)
    assert "the SHA-256 of every shard" in known.stdout

    tokens = stream_of(["a text from elsewhere"] * 10)
    bin_shard(tmp_path / "my_val_000000.bin", tokens[:50])
    bin_shard(tmp_path / "my_train_000001.bin", tokens[50:])
    unknown = call("fineweb.py", "--check", tmp_path, "--encoding=bytes")
    assert "--write_shards_json records their sums" in unknown.stdout
    assert not (tmp_path / "shards.json").exists()
    call("fineweb.py", "--check", tmp_path, "--encoding=bytes", "--write_shards_json")
    assert load_shards(tmp_path, verify=True).encoding == "bytes"
    assert load_shards(tmp_path).count("train") == len(tokens) - 50
    bin_shard(tmp_path / "my_train_000002.bin", tokens)
    known = call("fineweb.py", "--check", tmp_path)
    assert "shards.json does not list 1 file (my_train_000002.bin); not used" in known.stdout
    assert load_shards(tmp_path).count("train") == len(tokens) - 50
    (tmp_path / "my_train_000002.bin").unlink()

    bin_shard(tmp_path / "my_train_000001.bin", [7, *tokens[51:]])
    damaged = refusal(tmp_path / "out", "--check", tmp_path)
    assert "its SHA-256 is not the one in shards.json; remove it and fetch or copy it again" in damaged
    (tmp_path / "shards.json").unlink()
    bin_shard(tmp_path / "my_train_000001.bin", [*tokens[50:], 300])
    beyond = refusal(tmp_path / "out", "--check", tmp_path)
    assert f"my_train_000001.bin: token {len(tokens) - 50} is 300, beyond the 257" in beyond


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
