"""The page of a run: its data equal the files, in whatever state they are; only this machine gets them."""

import contextlib
import http.client
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

from conftest import ROOT, TINY, call
from support.cli import InputError
from support.machine.processes import World
from support.run import report, watch
from support.run.curves import read_log, smooth
from support.run.folder import RunFolder
from train_gpt2 import TrainConfig

import pytest
from test_curves import make_run


def write_status(folder, **values):
    (folder / "status.json").write_text(json.dumps({"time": time.time(), "events": [], **values}))


def numbers_of(folder):
    return dict(watch.Watcher(folder).data()["numbers"])


# ------------------------------------------------------------------ the data


def test_the_curves_are_the_log(tmp_path):
    folder = make_run(tmp_path / "a_run")
    data, events = watch.Watcher(folder).data(), read_log(folder / "log.txt")
    for kind in ("val", "hella"):
        assert [(step, value) for step, value, _, _ in data["curves"][kind]] == events[kind]
    for least_or_greatest in (2, 3):  # of a step alone: its loss
        raw = [(row[0], row[least_or_greatest]) for row in data["curves"]["train"]]
        assert raw == events["train"]
    assert (data["steps"], data["tokens_per_step"], data["unit"]) == (50, 524_288, "token")
    assert json.loads(json.dumps(data))["name"] == "a_run"


def test_a_long_curve_keeps_its_peaks():
    points = [(step, math.sin(step / 70)) for step in range(5001)]
    points[4321] = (4321, 9.0)
    rows = watch.thin(points)
    assert len(rows) == math.ceil(5001 / 8)
    assert rows[0] == (4, pytest.approx(sum(v for _, v in points[:8]) / 8), points[0][1], points[7][1])
    assert rows[4321 // 8][3] == max(most for _, _, _, most in rows) == 9.0
    assert min(least for _, _, least, _ in rows) == min(value for _, value in points)
    smoothed = watch.thin(points, smoothed=True)
    assert [row[1] for row in smoothed] == smooth([row[1] for row in rows], len(rows) // 80)
    assert [(row[0], *row[2:]) for row in smoothed] == [(row[0], *row[2:]) for row in rows]
    assert watch.thin([]) == watch.thin([], smoothed=True) == []


def test_any_other_value_has_a_curve_and_a_number(tmp_path):
    noise = [(step, math.sin(step)) for step in range(400)]
    more = [f"{step} {kind} {value}" for step, value in noise for kind in ("ema", "val", "hella")]
    folder = make_run(tmp_path / "a_run", more=[*more, "25 b/acc 1e-9", "400 hella nan", "hello"])
    data = watch.Watcher(folder).data()
    curves = data["curves"]
    assert list(curves) == ["train", "val", "hella", "ema", "b/acc"]
    assert [(step, least) for step, _, least, _ in curves["ema"]] == noise
    assert [mean for _, mean, _, _ in curves["ema"]] == smooth([value for _, value in noise], 5)
    for kind in ("val", "hella"):
        assert [(step, value) for step, value, _, _ in curves[kind]] == noise  # each was an evaluation
    assert curves["b/acc"] == [(25, 1e-9, 1e-9, 1e-9)]
    assert data["steps"] == 399
    left_out = "the curves leave out 1 unreadable line and 1 non-finite value of"
    again = "repeats 6 values; the later line counts"
    assert data["notes"] == [f"{left_out} {folder / 'log.txt'}", f"{folder / 'log.txt'} {again}"]
    numbers = dict(data["numbers"])
    assert (numbers["ema (step 399)"], numbers["b/acc (step 25)"]) == (f"{math.sin(399):.4g}", "1e-09")
    json.dumps(data, allow_nan=False)


def test_the_plan_that_remains(tmp_path):
    folder = make_run(tmp_path / "a", more=["0 lr 1e-3", "8 max_steps 4000", "8 cooldown 0.25"])
    facts = json.loads((folder / "run.json").read_text())
    facts["train_config"] |= {"schedule": "trapezoid", "max_steps": 4000, "cooldown": 0.25}
    (folder / "run.json").write_text(json.dumps(facts))
    data = watch.Watcher(folder).data()
    numbers = dict(data["numbers"])
    assert numbers["learning rate"] == "constant until step 3,000, then down to 0 at step 4,000"
    assert numbers["learning rate (step 0)"] == "0.001"
    assert list(data["curves"]) == ["train", "val", "hella", "learning rate"]
    assert not [name for name in numbers if name.startswith(("max_steps", "cooldown"))]
    (folder / "run.json").write_text(json.dumps(facts | {"result": {}}))
    assert "learning rate" not in dict(watch.Watcher(folder).data()["numbers"])


def test_a_log_is_followed(tmp_path):
    """Half a line waits for its end; what --resume cuts, and what it then writes anew, is seen."""
    watcher, log = watch.Watcher(tmp_path), tmp_path / "log.txt"

    def points():
        curves = watcher.data()["curves"]
        return {kind: [row[:2] for row in rows] for kind, rows in curves.items() if rows}

    assert points() == {}
    log.write_text("0 val 5.0\n0 train 4.5\n1 tra")
    assert points() == {"val": [(0, 5.0)], "train": [(0, 4.5)]}
    with open(log, "a") as file:
        file.write("in 4.25\n2 train nan\nhello\n3 other 1\n\0\0\n")
    assert points() == {"val": [(0, 5.0)], "train": [(0, 4.5), (1, 4.25)], "other": [(3, 1.0)]}
    assert "2 unreadable lines and 1 non-finite value" in watcher.data()["notes"][0]
    log.write_text("0 val 5.0\n0 train 4.5\n")
    assert points() == {"val": [(0, 5.0)], "train": [(0, 4.5)]}
    assert watcher.data()["notes"] == []
    log.unlink()
    assert points() == {}


def test_published_lines_only_where_they_compare(tmp_path):
    lines = watch.Watcher(make_run(tmp_path / "fair")).data()["published"]
    assert lines["val"] == [("OpenAI's GPT-2 (124M)", 3.2924, "right")]
    assert [value for _, value, _ in lines["hella"]] == [0.2955, 0.337, 0.25]
    lines = watch.Watcher(make_run(tmp_path / "bytes", encoding="bytes")).data()["published"]
    assert lines == {"val": [], "hella": [("chance", 0.25, "right")]}


def test_a_run_that_leaves_only_a_log(tmp_path):
    """...as the tutorial's do: the curves alone."""
    folder = make_run(tmp_path / "a_run")
    (folder / "run.json").unlink()
    data = watch.Watcher(folder).data()
    assert data["tokens_per_step"] is data["max_steps"] is None
    assert data["events"] == data["samples"] == []
    assert numbers_of(folder) == {
        "step": "50",
        "training loss (20 steps)": "6.0500",
        "validation loss (step 50)": "4.0000",
        "HellaSwag (step 50)": "0.2600",
    }


@pytest.mark.parametrize("content", ["", "{", "[]", '{"events": 3}', "nonsense", "\0\0\0"])
def test_a_damaged_status_is_no_status(tmp_path, content):
    folder = make_run(tmp_path / "a_run")
    (folder / "status.json").write_text(content)
    data = watch.Watcher(folder).data()
    assert data["events"] == data["notes"] == []
    assert len(data["curves"]["val"]) == 3


@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_damaged_run_json_is_named(tmp_path, content):
    folder = make_run(tmp_path / "a_run")
    (folder / "run.json").write_text(content)
    (note,) = watch.Watcher(folder).data()["notes"]
    assert "run.json: damaged" in note


def test_the_last_sign_of_life(tmp_path):
    folder = make_run(tmp_path / "a_run")

    def state():
        return watch.Watcher(folder).data()["state"]

    assert state()[0] == "running"
    hours_ago = time.time() - 3 * 3600
    os.utime(folder / "log.txt", (hours_ago, hours_ago))
    assert state()[0] == "silent"
    assert "last sign of life 3 h 00 min ago" in state()[1]
    write_status(folder, task="validation 2/4, 80 s left")  # its own clock counts, not the file's
    assert state() == ("running", "running, last sign of life 0 s ago; validation 2/4, 80 s left")
    write_status(folder, time=hours_ago)
    assert "last sign of life 3 h 00 min ago" in state()[1]
    write_status(folder, time=hours_ago, step_seconds=3601)  # a step of an hour says nothing for an hour
    assert state()[0] == "running"
    write_status(folder, time=time.time() + 100)
    assert "0 s ago" in state()[1]
    write_status(folder, time=hours_ago, ended=True)
    assert state()[0] == "stopped"
    (folder / "run.json").write_text(
        json.dumps({"result": {"training_hours": 1, "other_hours": 0, "tokens_per_second": 1234.6}})
    )
    assert state() == ("finished", "finished")
    assert numbers_of(folder)["speed"] == "1,235 tokens/s"


def test_what_can_not_be_watched_is_named(tmp_path):
    with pytest.raises(InputError, match="there is no folder"):
        watch.Watcher(tmp_path / "nowhere")
    make_run(tmp_path / "a_run")
    with pytest.raises(InputError, match=r"holds no run.*did you mean .*a_run\?"):
        watch.Watcher(tmp_path)
    (tmp_path / "empty").mkdir()
    assert watch.Watcher(tmp_path / "empty").data()["state"][0] == "waiting"
    (tmp_path / "empty/.lock").touch()  # a run that compiles
    assert watch.Watcher(tmp_path / "empty").data()["steps"] == 0


# ------------------------------------------------------------------ what a run writes


@pytest.fixture
def begin(tmp_path, monkeypatch):
    """A function that begins a report in tmp_path, with a clock of its own: the run costs a cent a second."""
    monkeypatch.setattr(report, "opening_table", lambda *_: "the table")
    monkeypatch.setattr(report, "facts_of", lambda *_, **__: dict(facts))
    clock = [1000.0]
    for name in ("monotonic", "perf_counter"):
        monkeypatch.setattr(report.time, name, lambda: clock[0])
    config = TrainConfig(log_dir=tmp_path, total_batch_size=1000, max_steps=101, dollars_per_hour=36.0)
    facts = {
        "train_config": {"max_steps": 101, "total_batch_size": 1000},
        "device": "a GPU",
        "precision": "bfloat16",
        "flops_per_token": 1,
        "val_tokens": 1024,
        "default_recipe": False,
    }

    def begin(interruptions=0, first_step=0):
        run = RunFolder(config, World(), print)
        run.interruptions, run.first_step = interruptions, first_step
        made = report.Report(config, World())
        made.start(run, None, None, None, None, n_items=0)
        made.clock = clock
        return made

    return begin


def test_time_and_money_left(begin, tmp_path):
    running = begin()
    for step in range(20):
        running.clock[0] += 10
        running.step(step, 4.0, 1e-3, 1.0, seconds=8.0)
    rows = numbers_of(tmp_path)
    assert rows["speed"] == "125 tokens/s"
    assert rows["training"] == "2 min 40 s"
    assert rows["evaluation, saving, start-up"] == "40 s"
    assert rows["training left"] == "11 min"  # 81 steps of 8 s: 648 s
    assert rows["cost"] == "$2.00"  # 200 s at a cent a second
    assert rows["cost of the training left"] == "$6.48"
    running.clock[0] += 10
    running.step(100, 4.0, 1e-3, 1.0, seconds=8.0)
    running.close("done")
    assert "cost" in numbers_of(tmp_path)
    assert not [name for name in numbers_of(tmp_path) if "left" in name]


def test_events_and_samples_outlive_an_interruption(begin, tmp_path):
    first = begin()
    first.clock[0] += 2
    first.print("step 3: saved")
    first.clock[0] += 2
    first.samples(4, ["Hello,\n\x1b[0m\u202e"])
    assert begin(interruptions=1, first_step=3).run.samples is None  # written by weights that are lost
    again = begin(interruptions=1, first_step=4)
    assert again.run.samples == (4, ["Hello,\n\ufffd[0m\ufffd"])  # the next model card has them
    again.clock[0] += 2
    again.print("resuming at step 3")
    data = watch.Watcher(tmp_path).data()
    assert [text for _, text in data["events"]] == ["step 3: saved", "resuming at step 3"]
    assert all(abs(at - time.time()) < 60 for at, _ in data["events"])
    assert (data["samples"], data["samples_step"]) == (["Hello,\n    \ufffd[0m\ufffd"], 4)
    again.close("stopped")  # in the same second as nothing else
    assert watch.Watcher(tmp_path).data()["state"][0] == "stopped"
    another = begin()
    another.clock[0] += 2
    another.print("a new run")
    assert [text for _, text in watch.Watcher(tmp_path).data()["events"]] == ["a new run"]


def test_a_run_that_starts_again_is_not_called_stopped(begin, tmp_path, monkeypatch):
    """Its first step may be minutes away."""
    first = begin()
    first.close("stopped")
    assert watch.Watcher(tmp_path).data()["state"][0] == "stopped"
    run = RunFolder(first.config, World(), print)
    monkeypatch.setattr(run, "look", lambda lock: [])
    run.interruptions = 1
    run.open_here()
    state, sentence = watch.Watcher(tmp_path).data()["state"]
    assert state == "starting"
    assert sentence.startswith("started again ")


def test_the_status_is_written_once_a_second_and_stays_small(begin, tmp_path, monkeypatch):
    running, written = begin(), []
    monkeypatch.setattr(running.run, "write_status", written.append)
    for step in range(50):
        running.clock[0] += 0.1
        running.step(step, 4.0, 1e-3, 1.0, seconds=0.1)
        running.print(f"event {step}")
    assert len(written) in (4, 5)
    for step in range(1000):
        running.print(f"event {step}")
    running.close("the end")
    assert len(written[-1]["events"]) == report.EVENTS_KEPT
    assert written[-1]["events"][-1][1] == "the end"


def test_other_processes_write_no_status(begin, tmp_path):
    running = begin()
    (tmp_path / "status.json").unlink()
    running.is_main = False
    running.clock[0] += 2
    running.print("event")
    running.sign_of_life("validation", 1, 2)
    assert not (tmp_path / "status.json").exists()


def test_a_full_disk_leaves_the_status_and_the_run(begin, tmp_path, monkeypatch):
    running = begin()
    before = (tmp_path / "status.json").read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    running.clock[0] += 2
    running.step(0, 4.0, 1e-3, 1.0, seconds=8.0)
    assert (tmp_path / "status.json").read_bytes() == before
    assert not (tmp_path / "status.json.tmp").exists()


def test_the_page_shows_how_far_an_evaluation_is(begin, tmp_path):
    running = begin()
    for done in range(3):
        running.clock[0] += 20
        running.sign_of_life("validation", done, 4)
    assert watch.Watcher(tmp_path).data()["state"][1].endswith("; validation 2/4, 40 s left")
    running.clock[0] += 20
    running.validation(0, 4.0)
    assert watch.Watcher(tmp_path).data()["state"][1].endswith("; training")


# ------------------------------------------------------------------ the server


@contextlib.contextmanager
def served(folder):
    """A function that gets a path from the page's server: (status, headers, text)."""
    with watch.Server(folder, 0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()

        def get(path, host="127.0.0.1", method="GET"):
            connection = http.client.HTTPConnection(*server.server_address, timeout=20)
            with contextlib.closing(connection):
                connection.request(method, path, headers={"Host": f"{host}:{server.server_port}"})
                answer = connection.getresponse()
                return answer.status, answer.headers, answer.read().decode()

        get.address = server.server_address
        try:
            yield get
        finally:
            server.shutdown()
            thread.join()


def test_the_server_gives_its_page_and_its_data_and_nothing_else(tmp_path):
    folder = make_run(tmp_path / "a_run")
    with served(folder) as get:
        assert get.address[0] == "127.0.0.1"
        status, headers, text = get("/")
        assert (status, headers["Content-Type"]) == (200, "text/html; charset=utf-8")
        assert text == (ROOT / "support/run/watch.html").read_text(encoding="utf-8")
        assert headers["Content-Security-Policy"].startswith("default-src 'none'")
        status, headers, text = get("/data.json", host="localhost")
        assert (status, headers["Content-Type"]) == (200, "application/json; charset=utf-8")
        assert json.loads(text)["curves"]["hella"][0] == [0, 0.26, 0.26, 0.26]
        for path in (
            "/log.txt",
            "/../a_run/log.txt",
            "/data.json/..",
            "//etc/passwd",
            "/%2e%2e/run.json",
            "/?",
        ):
            assert get(path)[0] == 404, path
        assert get("/data.json", host="evil.example")[0] == 403
        assert get("/data.json", method="POST")[0] == 501
        (folder / "run.json").write_text('{"train_config": 3}')
        status, _, text = get("/data.json")
        assert status == 500
        assert text.startswith("run.json or status.json is damaged")
        (folder / "log.txt").unlink()
        (folder / "log.txt").mkdir()  # as any fault of the system: it is named
        assert get("/data.json")[::2] == (500, f"{folder} holds no run ({folder}/log.txt: Is a directory)\n")


def test_nothing_is_loaded_from_elsewhere():
    page = (ROOT / "support/run/watch.html").read_text(encoding="utf-8")
    addresses = set(re.findall(r"https?://[^\s\"']+", page))
    assert addresses == {"http://www.w3.org/2000/svg"}  # a name, not a place
    assert "innerHTML" not in page
    for needed in ('<html lang="en">', "<title>", 'name="viewport"', "prefers-color-scheme", '"aria-label"'):
        assert needed in page


def test_a_run_is_read_while_it_writes(tmp_path):
    """Whatever a writer has got to: the data are whole lines, in order, and never fewer than before."""
    lines = "".join(f"{step} train {step % 7}.500000\n" for step in range(3000)).encode()
    stop = threading.Event()
    (tmp_path / "log.txt").touch()

    def write():
        with open(tmp_path / "log.txt", "ab", buffering=0) as file:
            for first in range(0, len(lines), 37):  # in the middle of lines
                file.write(lines[first : first + 37])
                if first % (37 * 20) == 0:
                    write_status(tmp_path, time=time.time())
        stop.set()

    with served(tmp_path) as get:
        writer, seen = threading.Thread(target=write), [0]
        writer.start()
        end = time.monotonic() + 30
        while not stop.is_set() or seen[-1] < 3000:
            assert time.monotonic() < end, "the last line does not appear"
            data = json.loads(get("/data.json")[2])
            assert data["notes"] == []
            rows = data["curves"]["train"]
            assert [row[0] for row in rows] == sorted(row[0] for row in rows)
            seen.append(data["steps"])
        writer.join()
    assert seen == sorted(seen)


def test_a_taken_port_is_one_line(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = call("plot.py", "watch", tmp_path, f"--port={port}", check=False)
    assert done.returncode == 2
    assert done.stderr == f"error: --port {port}: name another (Address already in use)\n"
    done = call("plot.py", "watch", tmp_path, "--port=99999", check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: --port 99999: ")
    assert done.stderr.count("\n") == 1


def hear_interrupts():
    """Even if the tests run in the background of a script: its shell lets them ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_ctrl_c_ends_it_quietly_and_it_needs_no_torch_and_no_matplotlib(tmp_path):
    for module in ("torch", "matplotlib"):
        (tmp_path / f"{module}.py").write_text("raise ImportError")
    (tmp_path / "log").mkdir()
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, ROOT / "plot.py", "watch", tmp_path / "log", "--port", "0"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, env=env, preexec_fn=hear_interrupts, **pipes)
    assert re.search(r"watching .*log at http://127\.0\.0\.1:\d+; Ctrl-C ends it", process.stdout.readline())
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, "", "")


# ------------------------------------------------------------------ a browser


def browser():
    """A Chromium on this machine, or None; $CHROMIUM names one that lies elsewhere."""
    names = (os.environ.get("CHROMIUM", ""), "chromium", "chromium-browser", "google-chrome")
    return next(filter(None, map(shutil.which, names)), None)


@pytest.mark.slow
@pytest.mark.skipif(not browser(), reason="no Chromium; $CHROMIUM may name one")
def test_a_browser_draws_a_run_and_tells_it_to_a_screen_reader(tmp_path, text_shards):
    folder = tmp_path / "a_run"
    flags = (*TINY, "--max_steps=40", "--val_every=10", "--sample_every=20", "--dollars_per_hour=1")
    call("train_gpt2.py", *flags, f"--data_dir={text_shards}", f"--log_dir={folder}")
    with open(folder / "log.txt", "a") as file:  # as a line in the training loop would log them
        file.write("3 ema -2.5\n9 ema 0.25\n7 <b>\n2 __proto__ 7\n")
    flags = (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path / 'b'}",
        "--virtual-time-budget=2000",
        "--window-size=390,844",
    )
    with served(folder) as get:
        url = "http://{}:{}/".format(*get.address)
        command = [browser(), *flags, "--dump-dom", url]
        page = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    losses = read_log(folder / "log.txt")["val"]
    assert "<title>finished: 40, a_run</title>" in page
    labels = re.findall(r'role="img" aria-label="(.*?)"', page)
    assert labels[0].endswith(f"validation: {float(f'{losses[-1][1]:.4g}')}")
    assert labels[3:] == ["__proto__. last value: 7", "ema. last value: 0.25"]
    assert [label.split(".")[0] for label in labels[1:3]] == ["learning rate", "gradient norm"]
    assert "<h2>ema</h2>" in page
    dots = [float(y) for y in re.findall(r"([-\d.]+)h\.001", page)]
    assert len(dots) == len(losses) + 2 * 40 + 3 == 88
    assert all(0 <= y <= 100 for y in dots[-3:])  # within the axes, also what is below 0
    assert dots[-2] > dots[-1]  # upwards, from -2.5 to 0.25
    assert "its range behind it<" in page
    assert re.search(r"<span[^>]*></span>validation</p>", page)
    assert not re.search("NaN|undefined|Infinity", page.split("<script>")[0])
    assert f"validation loss (step 40)</dt><dd>{losses[-1][1]:.4f}</dd>" in page
    assert "Samples at step" in page
    assert "done: 40 steps" in page
    assert re.search(r'id="trouble"[^>]*>the curves leave out 1 unreadable line of .*log.txt</p>', page)
