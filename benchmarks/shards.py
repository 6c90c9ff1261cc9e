"""
How fast text becomes shards, beside what tiktoken alone reaches and beside the straightforward way.

    python -m benchmarks.shards --input FOLDER [--n 5] [--threads 2] [--memory] [--out results.json]

In each of n rounds, in turn, on the same documents and with start-up excluded:

    shards       fineweb.py: files read, tokenized in threads, cut, hashed and flushed to disk
    tiktoken     encode_ordinary_batch of the texts, already in memory, on as many threads; nothing written
    pool, half   the straightforward way: a pool of half as many processes as cores, one document at a time,
                 the tokens copied to a shard and saved
    pool, all    the same with as many processes as cores

Then each part of the first way runs alone, on one thread. --memory measures the peak memory of the whole
process with 8 threads and a document of 200 MB.
"""

import json
import multiprocessing.pool
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fineweb import local_files, read_files
from support.data.documents import Reading
from support.data.encodings import get_encoding
from support.data.shards import ShardWriter, Stream, new_record, write_shards
from support.data.tokens import encode_stream
from support.files import sha256, write_file

import numpy as np
import pyarrow
import pyarrow.parquet
import tiktoken
import tyro

SHARD_SIZE = 10_000_000  # tokens


@dataclass(frozen=True)
class Config:
    """Measure the making of shards."""

    input: tuple[str, ...]  # as fineweb.py takes it
    n: int = 5  # rounds
    threads: int = 2  # or processes
    memory: bool = False  # measure the peak of memory, too
    out: Path | None = None  # write the figures here as JSON


def shards(config: Config, folder: Path) -> int:
    record = new_record(get_encoding("gpt2"), {}, {"shard_size": SHARD_SIZE, "max_tokens": None})
    stream = read_files(local_files(config.input), Reading(), None)
    return write_shards([Stream(stream)], ShardWriter(folder, record), config.threads)["tokens"]


def encode_in_process(text: str) -> np.ndarray:
    tokens = [encoding.eot_token]
    tokens.extend(encoding.encode_ordinary(text))
    return np.array(tokens).astype(np.uint16)


def start_process() -> None:
    global encoding
    encoding = get_encoding("gpt2")


def pool(processes: multiprocessing.pool.Pool, texts: list[str], folder: Path) -> int:
    shard, filled, n_shards, n_tokens = np.empty(SHARD_SIZE, np.uint16), 0, 0, 0
    for tokens in processes.imap(encode_in_process, texts, chunksize=16):
        n_tokens += len(tokens)
        while len(tokens):
            part = tokens[: SHARD_SIZE - filled]
            shard[filled : filled + len(part)] = part
            filled, tokens = filled + len(part), tokens[len(part) :]
            if filled == SHARD_SIZE:
                np.save(folder / f"{n_shards}.npy", shard)
                n_shards, filled = n_shards + 1, 0
    np.save(folder / f"{n_shards}.npy", shard[:filled])
    return n_tokens


def parts(config: Config, folder: Path) -> dict[str, float]:
    """Seconds that each part takes alone, on one thread."""
    seconds, clock = {}, time.perf_counter
    start = clock()
    pieces = list(read_files(local_files(config.input), Reading(), None))
    seconds["read"], start = clock() - start, clock()
    encoded = list(encode_stream(pieces, get_encoding("gpt2"), 1))
    seconds["tokenize"], start = clock() - start, clock()
    shard, filled = np.empty(SHARD_SIZE, np.uint16), 0
    for _, tokens, _ in encoded:
        n = min(len(tokens), SHARD_SIZE - filled)
        shard[filled : filled + n] = tokens[:n]
        filled = 0 if n < len(tokens) else filled + n
    seconds["cut"], start = clock() - start, clock()
    for _ in range(0, sum(len(tokens) for _, tokens, _ in encoded), SHARD_SIZE):
        write_file(folder / "shard.npy", lambda file: np.save(file, shard))
        sha256(folder / "shard.npy")
    seconds["write"] = clock() - start
    return seconds


def peak_memory(text: str, folder: Path) -> dict[str, int]:
    """Peak resident megabytes of `fineweb.py --workers 8` on a document of 200 MB, in each kind of file."""
    document = (text * (1 + 200_000_000 // len(text.encode())))[:200_000_000] + " 😀"
    (folder / "x.txt").write_text(document)
    (folder / "x.jsonl").write_text(json.dumps({"text": document}) + "\n")
    pyarrow.parquet.write_table(pyarrow.table({"text": [document]}), folder / "x.parquet")
    peaks = {}
    for kind in ("txt", "jsonl", "parquet"):
        command = [sys.executable, "fineweb.py", "--input", folder / f"x.{kind}", "--workers=8"]
        command += ["--output_dir", folder / kind, "--shard_size=40000000"]
        # from a fresh process: a child's peak counts what its parent held when it was started
        measure = "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=-3); "
        measure += "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
        done = subprocess.run([sys.executable, "-c", measure, *map(str, command)], stdout=-1, check=True)
        peaks[kind] = int(done.stdout) // 1024
    return peaks


def main(config: Config) -> None:
    texts = [piece.text for piece in read_files(local_files(config.input), Reading(), None)]
    gpt2 = get_encoding("gpt2")
    cores = os.cpu_count()
    context = multiprocessing.get_context("spawn")
    rates: dict[str, list[float]] = {}
    alone: dict[str, list[float]] = {}
    with (
        tempfile.TemporaryDirectory() as temporary,
        context.Pool(max(1, cores // 2), start_process) as half,
        context.Pool(cores, start_process) as whole,
    ):
        folder = Path(temporary)
        for processes in (half, whole):
            processes.map(encode_in_process, ["warm"] * 99)
        ways: dict[str, Callable[[], int]] = {
            "shards": lambda: shards(config, folder),
            "tiktoken": lambda: sum(map(len, gpt2.encode_ordinary_batch(texts, num_threads=config.threads))),
            "pool, half": lambda: pool(half, texts, folder),
            "pool, all": lambda: pool(whole, texts, folder),
        }
        for _ in range(config.n):
            for name, way in ways.items():
                start = time.perf_counter()
                n_tokens = way()
                rates.setdefault(name, []).append(n_tokens / (time.perf_counter() - start))
            for name, seconds in parts(config, folder).items():
                alone.setdefault(name, []).append(seconds)
        memory = peak_memory("".join(texts[:3000]), folder) if config.memory else None

    def ratio(name: str) -> dict[str, float]:
        ratios = [ours / theirs for ours, theirs in zip(rates["shards"], rates[name], strict=True)]
        return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}

    result = {
        "device": f"{platform.machine()}, {cores} cores",
        "tiktoken": tiktoken.__version__,
        "threads": config.threads,
        "n": config.n,
        "documents": len(texts),
        "tokens_per_second": rates,
        "ratio_of_shards_to": {name: ratio(name) for name in rates if name != "shards"},
        "seconds_alone": alone,
        "peak_megabytes_of_200_MB_document": memory,
    }
    print(f"{result['device']}, tiktoken {tiktoken.__version__}, {config.threads} threads, n = {config.n}")
    for name, values in rates.items():
        line = f"{name:12} {statistics.median(values) / 1e6:6.2f} M tokens/s ({min(values) / 1e6:.2f} to "
        line += f"{max(values) / 1e6:.2f})"
        if name != "shards":
            line += "   shards are {median:.2f} x ({min:.2f} to {max:.2f})".format(**ratio(name))
        print(line)
    print(
        "alone: " + ", ".join(f"{name} {statistics.median(values):.2f} s" for name, values in alone.items())
    )
    if memory:
        print("peak memory: " + ", ".join(f".{kind} {peak:,} MB" for kind, peak in memory.items()))
    if config.out:
        config.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Config, use_underscores=True))
