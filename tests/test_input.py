"""What people's files are like: packed, marked, hidden, linked, broken, cut. The text is what was meant, or
one line says why not."""

import gzip
import json
import os
import random
import re
import subprocess
import zipfile
from collections import Counter
from pathlib import Path

from conftest import bin_shard, call, make_shards
from hellaswag import load_items
from support.cli import InputError
from support.data.documents import PIECE, File, Reading, kind_of, read_documents, split_text
from support.data.encodings import END_OF_TEXT, get_encoding
from support.data.shards import load_shards

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from test_fineweb import make, refusal, stream_of, tokens_in
from test_hellaswag import GOOD

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
TEXT = "Grüße, 東京 and the rest of the text. " * 40


def zstd(data: bytes) -> bytes:
    return pyarrow.Codec("zstd").compress(data, asbytes=True)


def pzstd(data: bytes) -> bytes:
    """As this program writes it: before each frame, one to be skipped, with the size of the next."""
    frame = zstd(data)
    return b"\x50\x2a\x4d\x18\x04\0\0\0" + len(frame).to_bytes(4, "little") + frame


def texts_of(path, **reading):
    """The documents of a file, as `read_documents` yields them; None for a row without one."""
    pieces = list(read_documents(File(path.name, path.stat().st_size), path, Reading(**reading)))
    documents = {}
    for piece in pieces:
        documents.setdefault(piece.document, []).append(piece.text)
    return ["".join(parts) if None not in parts else None for parts in documents.values()]


# -----------------------------------------------------------------------------
# which files of a folder


def test_only_documents_are_read_and_the_rest_is_said(tmp_path):
    """Hidden files, tool folders, other kinds and records; an ending in any case is an ending."""
    folder = tmp_path / "in"
    names = "BOOK1.TXT deep/C.JSONL a.txt ._a.txt .git/x.txt __MACOSX/a.txt b.csv c.docx d.csv Makefile"
    for name in f"{names} dataset_info.json state.json .hidden/deep/y.parquet".split():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(
            json.dumps({"text": f"{name}\n" * 20}) if "JSONL" in name else f"{name}\n" * 20
        )
    os.mkfifo(folder / "pipe.txt")  # nobody writes to it: whoever opens it waits for ever
    said = make(tmp_path / "out", f"--input={folder}", "--shard_size=400").stdout
    for part in (
        "1 special file",
        "4 hidden files",
        "2 .csv files",
        "1 .docx file",
        "1 other file",
        "2 data-set records",
    ):
        assert part in said
    text = get_encoding("bytes").decode(tokens_in(tmp_path / "out"))
    found = Counter(re.findall(r"[^\n<]+\n", text))
    assert {name for name, n in found.items() if n > 9} == {"BOOK1.TXT\n", "deep/C.JSONL\n", "a.txt\n"}
    # What is named is read.
    (folder / "._a.txt").write_text("named " * 300)
    assert "hidden" not in make(tmp_path / "two", f"--input={folder}/._a.txt", "--shard_size=400").stdout


def test_the_train_split_is_taken_and_the_others_are_left(tmp_path):
    for name in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001", "validation"):
        pyarrow.parquet.write_table(pyarrow.table({"text": [f"{name} " * 20]}), tmp_path / f"{name}.parquet")
    (tmp_path / "test").mkdir()
    (tmp_path / "test/more.jsonl").write_text('{"text": "test"}')
    (tmp_path / "testimony_of_a_train.txt").write_text("a story " * 30)
    said = make(tmp_path / "out", f"--input={tmp_path}", "--shard_size=300").stdout
    assert "left out: 2 test-split files, 1 validation-split file" in said
    text = get_encoding("bytes").decode(tokens_in(tmp_path / "out"))
    assert ("train-00001" in text, "a story" in text, "test-0" in text, "validation" in text) == (
        True, True, False, False)  # fmt: skip
    said = make(tmp_path / "test_only", f"--input={tmp_path}/test-00000-of-00001.parquet", "--shard_size=150")
    assert "left out" not in said.stdout  # named


@pytest.mark.parametrize("name", ["a.txt", "b.jsonl", "c.parquet"])
def test_a_link_to_nowhere_is_an_error(name, tmp_path):
    (tmp_path / "x.txt").write_text("a text " * 100)
    (tmp_path / name).symlink_to(tmp_path / "gone")
    assert f"{name}: a link to a file that does not exist" in refusal(tmp_path / "out", f"--input={tmp_path}")


def test_a_folder_without_documents(tmp_path):
    (tmp_path / "data.arrow").touch()
    (tmp_path / ".x.txt").touch()
    said = refusal(tmp_path / "out", f"--input={tmp_path}")
    assert "no documents there; supported are .parquet" in said
    assert "left out: 1 hidden file, 1 .arrow file" in said


def test_kinds_by_name():
    kinds = {"a.TXT": ".txt", "a.txt.GZ": ".txt", "x.y.ndjson.zst": ".jsonl", "b.Json": ".jsonl"}
    kinds |= {"p.PARQUET": ".parquet", "p.parquet.gz": None, "a.gz": None, "txt": None, "a.txt.bz2": None}
    assert {name: kind_of(name) for name in kinds} == kinds


# -----------------------------------------------------------------------------
# how bytes become text


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("pack", [lambda data: data, gzip.compress, zstd, pzstd])
def test_a_mark_tells_the_encoding_and_the_first_bytes_the_packing(encoding, pack, tmp_path):
    """Whatever the name says; several packed members follow one another."""
    data = ("\ufeff" * (encoding == "utf-16-be") + TEXT).encode(encoding)
    (tmp_path / "a.txt").write_bytes(pack(data))
    assert texts_of(tmp_path / "a.txt") == [TEXT]
    rows = ("\ufeff" * (encoding == "utf-16-be") + '{"text": "ü 1"}\n{"text": "2"}\n').encode(encoding)
    half = rows.index(b"2")
    (tmp_path / "a.jsonl.gz").write_bytes(pack(rows[:half]) + pack(rows[half:]))
    assert texts_of(tmp_path / "a.jsonl.gz") == ["ü 1", "2"]


def test_what_is_not_utf8_is_named_with_how_much_of_it(tmp_path):
    (tmp_path / "good.txt").write_text("a good text " * 100)
    (tmp_path / "latin.txt").write_bytes("Grüße, schöne Grüße".encode("latin-1") * 5)
    (tmp_path / "french.txt").write_bytes(
        b"une \xe9cole, une for\xeat, un \xe9t\xe9 sans fin ni cesse. " * 30
    )
    (tmp_path / "nul.txt").write_bytes(b"words and \0 a NUL " * 9)
    said = make(tmp_path / "out", f"--input={tmp_path}", "--shard_size=700").stdout
    assert "(U+FFFD stands for each): 2 (first " in said
    assert "latin.txt, document 1: 25 of 95 characters" in said or "french.txt, document 1: 120 of 1," in said
    assert "documents with NUL characters (kept): 1 (first nul.txt, document 1: 9 of 162 characters)" in said
    record = json.loads((tmp_path / "out/shards.json").read_text())
    assert record["remarks"] == {"nul": 1, "replaced": 2}


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le"])
def test_utf16_without_its_mark_is_refused(encoding, tmp_path):
    (tmp_path / "a.txt").write_bytes(("An English text. " * 40).encode(encoding))
    assert "a.txt: more than a third of its first bytes are NUL" in refusal(
        tmp_path / "out", f"--input={tmp_path}/a.txt"
    )
    if encoding == "utf-16-le":  # the remedy
        fixed = subprocess.run(["iconv", "-f", "UTF-16LE", "-t", "UTF-8", tmp_path / "a.txt"],
                               capture_output=True, check=True)  # fmt: skip
        (tmp_path / "a.txt").write_bytes(fixed.stdout)
        assert texts_of(tmp_path / "a.txt") == ["An English text. " * 40]


def test_half_a_character_of_utf16_is_counted(tmp_path):
    data = TEXT.encode("utf-16")
    (tmp_path / "a.txt").write_bytes(data[:-1])
    (tmp_path / "b.txt").write_bytes(data[:40] + b"\0\xd8" + data[40:])
    said = make(tmp_path / "out", f"--input={tmp_path}", "--shard_size=700").stdout
    assert "(U+FFFD stands for each): 2" in said


@pytest.mark.parametrize(
    "data",
    [
        ("Широкая электрификация южных губерний даст мощный толчок. " * 40).encode("cp1251"),
        ("日本語のテキスト。" * 300).encode("shift-jis"),
        random.Random(0).randbytes(5000),
    ],
)
def test_another_encoding_is_refused(data, tmp_path):
    (tmp_path / "a.txt").write_bytes(data)
    said = refusal(tmp_path / "out", f"--input={tmp_path}/a.txt")
    assert "a.txt: more than a tenth of it is not UTF-8: another encoding" in said


def test_a_pipe_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "a.txt")
    assert "a.txt: a pipe or a device, not a file" in refusal(tmp_path / "out", f"--input={tmp_path}/a.txt")


def test_a_link_to_itself_is_an_error(tmp_path):
    (tmp_path / "a.txt").symlink_to(tmp_path / "a.txt")
    assert "a.txt: a link to a file that does not exist" in refusal(tmp_path / "out", f"--input={tmp_path}")


def test_an_archive_is_not_text(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.jsonl", "w") as file:
        file.writestr("x", "text")
    assert "a.jsonl: more than a third of its first bytes are NUL" in refusal(
        tmp_path / "out", f"--input={tmp_path}"
    )
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"]}), tmp_path / "a.jsonl")
    assert "a.jsonl: a Parquet file; give it a name" in refusal(tmp_path / "out", f"--input={tmp_path}")
    (tmp_path / "a.jsonl").write_bytes(zstd(b'{"text": "a text"}\n' * 99)[:-9])
    assert "a.jsonl: damaged, it can't be unpacked" in refusal(tmp_path / "out", f"--input={tmp_path}")


@pytest.mark.parametrize(
    "name", ["a.txt", "a.jsonl", "a.jsonl.gz", "a.parquet", "items.jsonl", "train_1.npy", "train.bin"]
)
def test_a_git_lfs_pointer_is_not_the_file(name, tmp_path):
    folder = make_shards(tmp_path / "shards", [300, 300]) if "train" in name else tmp_path
    (folder / name).write_text(POINTER)
    open_it = (lambda: load_shards(folder)) if "train" in name else lambda: texts_of(folder / name)
    if name == "items.jsonl":
        open_it = lambda: load_items(folder / name)  # noqa: E731
    message = f"{name}: a Git LFS pointer, not the file; fetch it with `git lfs pull`"
    with pytest.raises(InputError, match=message):
        open_it()


# -----------------------------------------------------------------------------
# documents


def test_a_text_is_split_at_its_marks_wherever_the_chunks_end():
    """Against str.split, with chunks of every size and marks that begin within themselves."""
    random.seed(0)
    for mark in (END_OF_TEXT, "--", "abab", "\n\n\n", "x"):
        for _ in range(300):
            parts = random.choices(
                [mark, mark[:-1], "\n", "a", "ab", "-", "text ", "\n\n"], k=random.randrange(9)
            )
            text = "".join(parts)
            n = random.randint(1, 12)
            found: dict[int, str] = {}
            for number, part in split_text([text[i : i + n] for i in range(0, len(text), n)], mark):
                found[number] = found.get(number, "") + part
            documents = [part.removeprefix("\n") if i else part for i, part in enumerate(text.split(mark))]
            assert found == {i: part for i, part in enumerate(documents) if part}, (text, mark, n)


def test_split_at_and_the_note_without_it(tmp_path):
    """Killed between any two shards, the job goes on; a long document is still cut into pieces."""
    stories = [f"Story {i}. " + "Once upon a time. " * (i % 7) for i in range(60)]
    stories[33] = "a long word and " * (PIECE // 8)
    (tmp_path / "all.txt").write_text(f"\n{END_OF_TEXT}\n".join(stories))
    flags = f"--input={tmp_path}/all.txt", "--shard_size=100000"
    done = make(tmp_path / "out", *flags, "--split_at", END_OF_TEXT)
    expected = stream_of([story + "\n" * (i < 59) for i, story in enumerate(stories)])
    assert "60 documents" in done.stdout
    assert tokens_in(tmp_path / "out") == expected
    done = make(tmp_path / "one", *flags)
    assert "--split_at): 1 (first all.txt, document 1: 59 times)" in done.stdout
    # after a kill
    record = json.loads((tmp_path / "out/shards.json").read_text())
    for shard in record["shards"][3:]:
        (tmp_path / "out" / shard["file"]).unlink()
    del record["shards"][3:]
    (tmp_path / "out/shards.json").unlink()
    (tmp_path / "out/shards.partial.json").write_text(json.dumps(record))
    assert "split_at was <|endoftext|>, is None" in refusal(tmp_path / "out", *flags)
    make(tmp_path / "out", *flags, "--split_at", END_OF_TEXT)
    assert tokens_in(tmp_path / "out") == expected


@pytest.mark.parametrize(
    "content", ["nonsense", "[1, 2]", '{"body": "x"}', '{"text": 7}', "{", '{"text": "cut']
)
def test_a_bad_row_is_skipped_if_that_is_asked_for(content, tmp_path, monkeypatch):
    monkeypatch.setattr("support.data.tokens.TASK", 200)  # so that shards are finished before the bad row
    rows = [json.dumps({"text": f"row {i} " * 9}) for i in range(130)]
    (tmp_path / "x.jsonl").write_text("\n".join([*rows[:120], content, *rows[120:]]))
    flags = f"--input={tmp_path}/x.jsonl", "--shard_size=500"
    assert f"{tmp_path}/x.jsonl, line 121: " in refusal(tmp_path / "out", *flags)
    finished = len(json.loads((tmp_path / "out/shards.partial.json").read_text())["shards"])
    assert finished > 0
    done = make(tmp_path / "out", *flags, "--skip_bad_rows")  # goes on from there
    assert f"resuming after {finished} finished shard" in done.stdout
    assert "bad rows skipped: 1 (first x.jsonl, document 121)" in done.stdout
    assert tokens_in(tmp_path / "out") == stream_of([f"row {i} " * 9 for i in range(130)])


def test_a_line_mended_behind_the_last_shard_costs_no_shard(tmp_path, monkeypatch):
    """Of one file, and of the second of two groups; a change before that place is another input."""
    monkeypatch.setattr("support.data.tokens.TASK", 200)
    rows = [json.dumps({"text": f"row {i} " * 9}) for i in range(200)]
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "a/x.jsonl").write_text("\n".join(rows[:30]))
    broken = tmp_path / "b/y.jsonl"
    broken.write_text("\n".join([*rows[30:150], '{"text": ', *rows[150:]]))
    flags = "--input", tmp_path / "a", tmp_path / "b", "--shard_size=300"
    assert "y.jsonl, line 121: not JSON" in refusal(tmp_path / "out", *flags)
    partial = (tmp_path / "out/shards.partial.json").read_text()
    broken.write_text("\n".join([*rows[30:150], '{"text": "mended"}', *rows[150:]]))
    (tmp_path / "a/x.jsonl").write_text("\n".join(rows[:31]))
    assert "files differ in ['x.jsonl'" in refusal(tmp_path / "out", *flags)
    assert (tmp_path / "out/shards.partial.json").read_text() == partial
    (tmp_path / "a/x.jsonl").write_text("\n".join(rows[:30]))
    done = make(tmp_path / "out", *flags)
    assert "note: y.jsonl has changed; what was read of it before stays in the shards" in done.stdout
    make(tmp_path / "fresh", *flags)
    assert tokens_in(tmp_path / "out") == tokens_in(tmp_path / "fresh")
    broken.write_text("\n".join(rows[30:]))
    assert "files differ in ['y.jsonl'" in refusal(tmp_path / "out", *flags)  # finished


def test_a_change_in_what_validation_holds_of_another_group_is_refused(tmp_path, monkeypatch):
    """Training would read there what validation holds. A line that is mended behind that place costs nothing,
    though only the validation split is finished."""
    monkeypatch.setattr("support.data.tokens.TASK", 50)
    rows = [json.dumps({"text": f"row {i} " * 9}) for i in range(200)]
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    x, y = tmp_path / "a/x.jsonl", tmp_path / "b/y.jsonl"
    x.write_text("\n".join([*rows[:60], '{"text": ', *rows[60:100]]))
    y.write_text("\n".join(rows[100:]))
    flags = "--input", tmp_path / "a", tmp_path / "b", "--shard_size=9000", "--val_size=300"
    assert "x.jsonl, line 61: not JSON" in refusal(tmp_path / "out", *flags)
    partial = (tmp_path / "out/shards.partial.json").read_text()
    assert len(json.loads(partial)["shards"]) == 1
    x.write_text("\n".join(rows[:100]))
    y.write_text("\n".join(['{"text": "one more"}', *rows[100:]]))
    assert "y.jsonl has changed before the place where" in refusal(tmp_path / "out", *flags)
    y.write_text(rows[100])  # the beginning is the same
    assert "y.jsonl has changed before the place where" in refusal(tmp_path / "out", *flags)
    assert (tmp_path / "out/shards.partial.json").read_text() == partial
    y.write_text("\n".join([*rows[100:], '{"text": "one more"}']))
    make(tmp_path / "out", *flags)
    make(tmp_path / "fresh", *flags)
    assert tokens_in(tmp_path / "out") == tokens_in(tmp_path / "fresh")


@pytest.mark.parametrize("kind", ["another", "shorter", "earlier"])
def test_another_file_of_that_name_is_refused(kind, tmp_path, monkeypatch):
    """What the last finished shard ends with is not there any more."""
    monkeypatch.setattr("support.data.tokens.TASK", 200)
    rows = [json.dumps({"text": f"row {i} " * 9}) for i in range(130)]
    (tmp_path / "x.jsonl").write_text("\n".join([*rows[:120], "{", *rows[120:]]))
    flags = f"--input={tmp_path}/x.jsonl", "--shard_size=500"
    assert "line 121: " in refusal(tmp_path / "out", *flags)
    changed = {"another": rows[50:], "shorter": rows[:3], "earlier": ["{}", *rows]}[kind]
    (tmp_path / "x.jsonl").write_text("\n".join(changed).replace("{}", '{"text": "one more"}'))
    before = (tmp_path / "out/shards.partial.json").read_text()
    assert "x.jsonl has changed before the place where" in refusal(tmp_path / "out", *flags)
    assert (tmp_path / "out/shards.partial.json").read_text() == before


def test_json_that_is_not_a_line_each_says_what_to_do(tmp_path):
    path, rows = tmp_path / "x.json", [{"text": "one " * 99}, {"text": "two"}]
    for text, message, remedy in (
        (json.dumps(rows), "a JSON array", "jq -c '.[]'"),
        (json.dumps(rows, indent=2), "a JSON array", "jq -c '.[]'"),
        (json.dumps(rows[0], indent=2), "JSON over several lines", "jq -c ."),
    ):
        path.write_text(text)
        said = refusal(tmp_path / "out", f"--input={path}")
        assert f"x.json, line 1: {message}; " in said
        assert f"{remedy} IN > OUT.jsonl" in said


def test_columns_of_every_kind_of_string(tmp_path):
    strings = pyarrow.array(["one", None, "two", "one"])
    for i, (column, expected) in enumerate((
        (strings.dictionary_encode(), ["one", None, "two", "one"]),
        (strings.cast(pyarrow.large_string()).dictionary_encode(), ["one", None, "two", "one"]),
        (pyarrow.nulls(3), [None] * 3),
    )):  # fmt: skip
        pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / f"{i}.parquet")
        assert texts_of(tmp_path / f"{i}.parquet") == expected
    numbers = pyarrow.table({"text": pyarrow.array([1, 2]).dictionary_encode()})
    pyarrow.parquet.write_table(numbers, tmp_path / "x.parquet")
    assert "holds int64, not strings" in refusal(tmp_path / "out", f"--input={tmp_path}/x.parquet")


@pytest.mark.parametrize("n", [400, *(pytest.param(n, marks=pytest.mark.slow) for n in (1500, 16_000))])
def test_the_advice_for_a_short_text_works(n, tmp_path):
    """What the message names leads to a run."""
    (tmp_path / "x.txt").write_text("so " * (n // 3))
    said = refusal(tmp_path / "out", f"--input={tmp_path}/x.txt", "--shard_size=20000")
    val_size = re.search(r"choose --val_size (\d+)", said)[1]
    length = re.search(r"a --sequence_length below (\d+)", said)
    T = int(length[1]) - 1 if length else 1024
    make(tmp_path / "out", f"--input={tmp_path}/x.txt", "--shard_size=20000", f"--val_size={val_size}")
    call("train_gpt2.py", f"--data_dir={tmp_path}/out", f"--log_dir={tmp_path}/log", "--max_steps=1",
         f"--sequence_length={T}", f"--total_batch_size={T}", "--n_layer=1", "--n_head=1", "--n_embd=8",
         "--hellaswag_every=0", "--device=cpu", "--micro_batch_size=1", "--sample_every=0")  # fmt: skip


def test_a_folder_of_ones_own_called_downloads_stays(tmp_path):
    """fineweb.py keeps the Hub's files in a folder of that name."""
    (tmp_path / "downloads").mkdir()
    (tmp_path / "downloads/x.txt").write_text("a word " * 1000)
    for end in ("7,001 tokens in 11 shards", "is finished"):
        assert end in make(tmp_path, f"--input={tmp_path}/downloads/x.txt", "--shard_size=700").stdout
    assert (tmp_path / "downloads/x.txt").exists()


# -----------------------------------------------------------------------------
# HellaSwag's file, and shards


def test_hellaswags_file_is_read_as_any_other(tmp_path):
    lines = "\n\n".join(json.dumps({**GOOD, "ind": i}) for i in range(3))
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist([{**GOOD, "ind": i} for i in range(3)]), tmp_path / "p.parquet"
    )
    (tmp_path / "a.jsonl").write_text("\ufeff" + lines)
    (tmp_path / "b.jsonl").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "c.jsonl.zst").write_bytes(zstd(lines.encode()))
    (tmp_path / "d.jsonl").write_bytes(lines.encode("utf-16"))
    for path in tmp_path.iterdir():
        assert [item.ind for item in load_items(path)] == [0, 1, 2], path
    pyarrow.parquet.write_table(pyarrow.table({"ind": [1]}), tmp_path / "p.parquet")
    with pytest.raises(InputError, match=r"p.parquet, row 1: not a HellaSwag item"):
        load_items(tmp_path / "p.parquet")


def test_nanogpts_files_are_tokens_alone(tmp_path):
    tokens = np.arange(2000, dtype="<u2")
    tokens.tofile(tmp_path / "train.bin")
    tokens[:500].tofile(tmp_path / "val.bin")
    shards = load_shards(tmp_path)
    assert (shards.encoding, shards.count("train"), shards.tokens["val"][0][-1]) == ("gpt2", 2000, 499)
    bin_shard(tmp_path / "train.bin", tokens)  # llm.c's format under the same name
    assert load_shards(tmp_path).tokens["train"][0].tolist() == tokens.tolist()
    tokens.tofile(tmp_path / "train.bin")
    (tmp_path / "meta.pkl").touch()
    with pytest.raises(InputError, match=r"its tokens are those of the meta.pkl beside it"):
        load_shards(tmp_path)
    (tmp_path / "meta.pkl").unlink()
    os.rename(tmp_path / "train.bin", tmp_path / "train_1.bin")
    with pytest.raises(InputError, match=r"train_1.bin: not a token shard of llm.c"):
        load_shards(tmp_path)


def test_hidden_files_beside_shards_are_no_shards(tmp_path):
    make_shards(tmp_path, [300, 300])
    for name in ("._edufineweb_train_000001.npy", "._train.bin"):
        Path(tmp_path / name).write_bytes(b"\0\5\x16\7Mac OS X")
    assert load_shards(tmp_path).count("train") == 300
