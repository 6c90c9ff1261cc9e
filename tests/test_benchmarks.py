"""The commands in benchmarks/ that nobody should debug on the day a GPU is there."""

import json
import os
import re
import shlex
import signal
import sys
import time
from dataclasses import replace

from benchmarks import gpu, hellaswag, paper, sampling, training
from conftest import ROOT, make_shards, run
from support.cli import InputError, parse
from support.run.curves import read_log

import pytest
import torch

RATES = {"tokens_per_second": 100.0, "least": 90.0, "most": 110.0}


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """The measurements that are made, in order. They return at once; 64 rows fit nowhere, and a peer has
    room for 16."""
    names = []

    def train(way, config, seconds):
        names.append((way, config.batch_size, config.loss_chunks, config.memory_budget, config.recompute))
        if config.batch_size > (32 if way.startswith("ours") else 16) and way != "matmul":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 6.14 GiB\nand so on")
        if config.memory_budget == 0.5:
            raise ValueError("the compiler is at a loss")
        result = {"way": way, "rows": config.batch_size, "n": 3}
        return result | ({"flop_per_second": 7e14} if way == "matmul" else RATES | {"mfu": 0.4})

    def score(config):
        names.append("HellaSwag")
        return {"seconds": {"ours": [1.0], "one at a time": [2.0]}, "items": 4, "all_items": 12,
                "different": 0, "largest_difference": 1e-5, "all_seconds": 3.0,
                "all_seconds_one_at_a_time": 9.0}  # fmt: skip

    def sample(config):
        names.append("sampling")
        rates = {"plain": [20.0], "transformers": [10.0]}
        return {"by_batch_size": {1: {"tokens_per_second": rates, "same_text": True}}}

    def tests(seconds):
        names.append("tests")
        return {"passed": 5, "failed": 0, "errors": 0, "skipped": 0}

    def train_for_real(rate, seconds, **_):
        names.append(("train_gpt2.py", rate))
        return RATES | {"last_val": (40, 5.0), "max_steps": 40, "n": 30, "seconds": 60.0}

    def here(function, arguments, seconds):
        class Pipe:
            def send(self, result):
                self.result = result

        pipe = Pipe()
        gpu.send_result(pipe, function, arguments)
        return pipe.result

    monkeypatch.setattr(training, "measure", train)
    monkeypatch.setattr(hellaswag, "measure", score)
    monkeypatch.setattr(sampling, "measure", sample)
    monkeypatch.setattr(gpu, "run_tests", tests)
    monkeypatch.setattr(gpu, "run_training", train_for_real)
    monkeypatch.setattr(gpu, "in_a_process", here)
    monkeypatch.setattr(gpu, "TINY", replace(gpu.TINY, rows=gpu.FULL.rows, compared=gpu.FULL.compared))
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    return names


@pytest.fixture
def config(tmp_path):
    (tmp_path / "items.jsonl").touch()
    return gpu.Config(device="cpu", tiny=True, out=tmp_path / "out", data_dir=tmp_path,
                      hellaswag_data=tmp_path / "items.jsonl")  # fmt: skip


def record_of(config):
    (file,) = config.out.glob("*_tiny.json")
    return file, json.loads(file.read_text(encoding="utf-8"))


def test_all_parts_are_measured_once(asked, config, capsys):
    gpu.main(config)
    assert len(asked) == len(set(asked)) == 28
    assert asked[0] == "tests"
    ways = [entry for entry in asked if isinstance(entry, tuple) and len(entry) == 5]
    assert ways[:3] == [("matmul", 64, 1, 1.0, False), ("ours compiled", 64, 1, 1.0, False),
                        ("ours compiled", 32, 1, 1.0, False)]  # fmt: skip
    for way in ("ours", "ours compiled"):
        assert {rows for name, rows, *plain in ways if name == way and plain == [1, 1.0, False]} - {64} == {
            32, 16, 8, 4, 2, 1,
        }  # fmt: skip
    for way in ("tutorial", "tutorial compiled", "transformers compiled"):
        assert [rows for name, rows, *_ in ways if name == way] == [32, 16]
    assert {tuple(changes) for name, rows, *changes in ways if rows == 32 and name == "ours compiled"} == {
        (1, 1.0, False), (32, 1.0, False), (1, 0.9, False), (1, 0.5, False), (1, 1.0, True),
    }  # fmt: skip
    assert asked[-3:] == ["sampling", "HellaSwag", ("train_gpt2.py", 100.0)]

    file, record = record_of(config)
    assert record["finished"] == ["a", "b", "c", "d"]
    assert {"device", "torch", "cuda", "cudnn", "transformers", "python", "dtype", "machine"} <= set(
        record["facts"]
    )
    failed = record["parts"]["b"]["ours compiled, 64 rows"]
    assert failed["error"] == "out of memory: CUDA out of memory. Tried to allocate 6.14 GiB"
    assert "traceback" in failed
    lost = record["parts"]["b"]["ours compiled, 32 rows, memory_budget 0.5"]
    assert lost["error"] == "ValueError: the compiler is at a loss"

    asked.clear()
    gpu.main(config)
    assert asked == []
    gpu.main(replace(config, data_dir=None, hellaswag_data=None))  # not needed any more
    assert asked == []
    assert record_of(config)[1] == record
    capsys.readouterr()
    gpu.main(gpu.Config(rows=file))
    printed = capsys.readouterr().out
    assert "| ours compiled, 32 rows | 100 (90 to 110) | 3 | 40.0% |" in printed
    assert "| ours compiled, 64 rows | failed: out of memory |" in printed
    assert "| 1 | plain | 20.0 (20.0 to 20.0) | 2.00 (2.00 to 2.00) | 1 | yes |" in printed
    assert "5 passed, 0 failed" in printed
    assert "700.0 TFLOP/s" in printed


def test_a_half_finished_file_is_continued(asked, config):
    gpu.main(config)
    everything = list(asked)
    file, record = record_of(config)
    for name in ("matmul, 64 rows", "ours compiled, 2 rows"):
        del record["parts"]["b"][name]
    del record["parts"]["d"]
    file.write_text(json.dumps(record), encoding="utf-8")
    asked.clear()
    gpu.main(config)
    missing = [("matmul", 64, 1, 1.0, False), ("ours compiled", 2, 1, 1.0, False), ("train_gpt2.py", 100.0)]
    assert asked == missing
    asked.clear()
    gpu.main(replace(config, retry=True))
    assert asked == [entry for entry in everything if isinstance(entry, tuple) and len(entry) == 5 and (
        (entry[1] > (32 if entry[0].startswith("ours") else 16) and entry[0] != "matmul") or entry[3] == 0.5
    )]  # fmt: skip


def test_time_that_is_up_leaves_what_was_measured(asked, config, monkeypatch, capsys):
    clock = iter(range(0, 10**6, 100))  # every look at the clock takes 100 s
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    gpu.main(replace(config, parts=("b",), minutes_per_part=8))
    assert 2 <= len(asked) <= 5
    assert "time is up; the same command goes on with" in capsys.readouterr().out
    _, record = record_of(config)
    assert len(record["parts"]["b"]) == len(asked)
    assert record["finished"] == []


def test_missing_input_is_named_and_the_rest_goes_on(asked, config, capsys):
    gpu.main(replace(config, parts=("c", "d"), hellaswag_data=None, data_dir=config.out / "nothing"))
    printed = capsys.readouterr().out
    assert "part c: HellaSwag is skipped: --hellaswag_data is not given" in printed
    assert f"part d: train_gpt2.py is skipped: --data_dir {config.out / 'nothing'} does not exist" in printed
    assert asked == ["sampling"]
    assert record_of(config)[1]["finished"] == []


def test_other_versions_are_not_mixed(asked, config):
    gpu.main(replace(config, parts=("a",)))
    file, record = record_of(config)
    record["facts"] |= {"torch": "2.0.0", "commit": "another"}
    file.write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(InputError, match="measured with another torch; move it away"):
        gpu.main(config)


@pytest.mark.slow
def test_a_process_that_dies_or_hangs_is_a_failure():
    assert gpu.in_a_process(os._exit, {"status": 3}, 60) == {"error": "the process ended with exit status 3"}
    start = time.monotonic()
    assert gpu.in_a_process(hang, {}, 3) is None
    assert time.monotonic() - start < 20


def hang():
    while True:
        time.sleep(1)


@pytest.mark.slow
def test_a_program_ends_in_time_with_all_that_it_started(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import signal, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print(child.pid, flush=True)\n"
        "if len(sys.argv) > 1:\n"
        "    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n"
        "else:\n"
        "    signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "time.sleep(60)\n"
    )
    for arguments, expected in ((["polite"], 143), ([], -signal.SIGKILL)):
        command = [sys.executable, str(script), *arguments]
        status, text = gpu.run_program(command, tmp_path / "output", seconds=1.5, to_save=0.5)
        assert status == expected
        time.sleep(0.2)
        assert not is_running(int(text))


def is_running(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().split()[2] != "Z"
    except FileNotFoundError:
        return False


def test_a_run_stopped_before_its_first_evaluation_is_noted(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "run_program", lambda *_: (128 + signal.SIGTERM, "warm-up"))
    config = gpu.Config(tiny=True, device="cpu", data_dir=tmp_path)
    result = gpu.run_training(config, gpu.TINY, None, tmp_path / "beside.json", 60.0)
    assert result["error"] == "train_gpt2.py was stopped before its first evaluation"
    assert "stopped before" in gpu.run_text(result)


def test_the_documented_command_parses():
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"^python -m benchmarks\.gpu (.+)$", page, re.MULTILINE)
    config = parse(gpu.Config, {}, shlex.split(command))
    assert config.parts == ("a", "b", "c", "d")
    assert all(getattr(config, flag) for flag in gpu.NEEDS.values())
    assert parse(gpu.Config, {}, ["--parts", "b", "--retry", "--tiny", "--minutes_per_part=1"]).parts == (
        "b",
    )


def test_the_shares_on_paper_add_up(capsys, monkeypatch):
    monkeypatch.setattr(paper, "drawing_seconds", lambda n: [0.25, 0.5, 0.75])
    paper.main(paper.Config(n=3))
    printed = capsys.readouterr().out.split("gpt2-xl")[0]  # another table follows
    assert "drawing: 0.50 (0.25 to 0.75) s" in printed
    rows = [line.strip("| ").split(" | ") for line in printed.splitlines() if line.startswith("|")][2:]
    names, numbers = [row[0] for row in rows], [[float(cell.replace(",", "").strip("%")) for cell in row[1:]]
                                                for row in rows]  # fmt: skip
    assert names[0] == "training"
    assert names[-1] == "all but training"
    for seconds, shares in (list(zip(*numbers, strict=True))[i : i + 2] for i in (0, 2)):
        assert sum(shares[:-1]) == pytest.approx(100, abs=0.3)  # rounded to a tenth
        assert shares[0] + shares[-1] == pytest.approx(100, abs=0.15)
        assert sum(seconds[1:-1]) == pytest.approx(seconds[-1], abs=0.03)
    # by hand: 250 x 524,288 tokens at 45 minutes for 10 billion; a third of the work for 10,485,760
    assert numbers[0][0] == pytest.approx(250 * 524_288 * 45 * 60 / 10e9, abs=0.01)
    assert numbers[1][0] == pytest.approx(10_485_760 / 3 * 45 * 60 / 10e9, abs=0.01)


def test_gradients_of_a_divided_model_on_paper():
    """By hand, for 24 GB and 2 or 4 rows: each micro-step gathers 2 bytes for each of 1,557,611,200
    parameters, those of the blocks (all but 50,257 x 1,600) twice; a process receives 7/8 of that, and of the
    gradients' 4 bytes."""
    last, each = paper.exchanges(24, False)
    blocks, rest = 1_557_611_200 - 50_257 * 1_600, 50_257 * 1_600
    gathered, gradients = 4 * blocks + 2 * rest, 4 * 1_557_611_200
    assert last == ["2", "32", f"{7 / 8 * (32 * gathered + gradients) / 2**30:.0f}"]
    assert each == ["4", "16", f"{7 / 8 * 16 * (gathered + gradients) / 2**30:.0f}"]


def test_drawings_are_timed_on_a_whole_run(monkeypatch):
    drawn = []
    monkeypatch.setattr(
        paper, "draw_runs", lambda folders, out: drawn.append(read_log(folders[0] / "log.txt"))
    )
    assert len(paper.drawing_seconds(2)) == 2
    assert len(drawn) == 3
    assert {kind: len(values) for kind, values in drawn[0].items()} == {
        "train": 19_073,
        "val": 77,
        "hella": 77,
    }


def test_texts_are_compared_in_float32_and_timed_in_the_dtype(monkeypatch, capsys):
    """In bfloat16 logits tie: greedy texts of a random model differ by the order of a sum."""
    dtypes, generate = [], sampling.GPT.generate

    def look(model, *given, **options):
        dtypes.append(model.lm_head.weight.dtype)
        return generate(model, *given, **options)

    monkeypatch.setattr(sampling.GPT, "generate", look)
    tiny = sampling.Config(n=1, batch_sizes=(1, 2), new_tokens=3, n_layer=1, n_embd=64, dtype="bfloat16")
    results = sampling.measure(tiny)["by_batch_size"]
    assert [figures["same_text"] for figures in results.values()] == [True, True]
    assert dtypes == 2 * [torch.float32, torch.bfloat16, torch.bfloat16]


@pytest.mark.slow
def test_the_command_in_miniature(tmp_path):
    """All four parts on a CPU, in processes of their own, as the command makes them on a GPU."""
    items = [{"ind": i, "ctx": "A cat sits", "endings": ["on a mat", "in it", "a", "of"], "label": i % 4}
             for i in range(6)]  # fmt: skip
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    make_shards(tmp_path / "shards", [2000, 5000])
    command = ("-m", "benchmarks.gpu", "--tiny", "--device=cpu",
               f"--out={tmp_path}", f"--data_dir={tmp_path / 'shards'}",
               f"--hellaswag_data={tmp_path / 'items.jsonl'}")  # fmt: skip
    done = run(*command, timeout=500)
    (file,) = tmp_path.glob("*_tiny.json")
    record = json.loads(file.read_text(encoding="utf-8"))
    assert record["finished"] == ["a", "b", "c", "d"]
    results = {name: result for part in record["parts"].values() for name, result in part.items()}
    assert not [name for name, result in results.items() if "error" in result]
    assert results["tests marked cuda"]["skipped" if not torch.cuda.is_available() else "passed"] > 3
    assert results["train_gpt2.py"]["last_val"][0] == 4
    losses = [round(result["loss"], 3) for name, result in results.items()
              if name.startswith("ours") and "2 rows" in name]  # fmt: skip
    assert len(losses) == 6
    assert len(set(losses)) == 1
    assert results["HellaSwag"]["different"] == 0
    for name in ("log.txt", "run.json", "loss.png", "output.txt"):
        assert (tmp_path / f"{file.stem}_{name}").exists()

    again = run(*command)
    assert again.stdout.count("measured before, nothing to do") == 4
    assert again.stdout.split("\n\n", 1)[1] == done.stdout[done.stdout.index("\n\n") :].split("\n\n", 1)[1]
    del record["parts"]["b"]["ours, 1 row"]
    file.write_text(json.dumps(record), encoding="utf-8")
    half = run(*command)
    assert half.stdout.count(" ...\n") == 1
