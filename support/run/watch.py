"""
A page for the browser on this machine: how a run is doing, read from the files in its folder.

The server answers two addresses: / with watch.html, and /data.json with all that the page shows. It needs no
process of the run, so a copy of the folder, or one mounted from another machine, will do.
"""

import contextlib
import errno
import json
import os
import statistics
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from support.cli import InputError, duration, in_words, plural
from support.run.curves import (
    USUAL_KINDS,
    Log,
    Points,
    caption,
    published_values,
    read_log,
    read_run,
    read_status,
    smooth,
    standard_error,
)

MOST_ROWS = 1000  # of a curve: a chart has not many more pixels
SILENCE = 300  # seconds without a sign of life, for instance in a save, that mean nothing yet
RUN_FILES = ("log.txt", "run.json", "status.json", ".lock", "checkpoint_*")
INLINE = "script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:"
POLICY = f"default-src 'none'; connect-src 'self'; {INLINE}"  # nothing from elsewhere
Rows = list[tuple[int, float, float, float]]  # (step, value, least, greatest)


class LogReader:
    """Follows a log.txt: reads only what was added, and all of it after --resume has cut it."""

    def __init__(self, file: Path):
        self.file = file
        self.restart()

    def restart(self) -> None:
        self.log = Log()
        self.end, self.last_bytes = 0, b""  # where the lines in it end, and how

    def read(self) -> None:
        """Read the complete lines that were added. A missing file holds no events."""
        try:
            with open(self.file, "rb") as file:
                file.seek(self.end - len(self.last_bytes))
                if file.read(len(self.last_bytes)) != self.last_bytes:
                    self.restart()
                    file.seek(0)
                added = file.read()
        except OSError:
            self.restart()
            return
        lines = added[: added.rfind(b"\n") + 1]
        self.log.add(lines)
        self.end += len(lines)
        self.last_bytes = (self.last_bytes + lines)[-200:]  # several losses: another log has others


def thin(points: Points, smoothed: bool = False) -> Rows:
    """At most MOST_ROWS rows, each for 1, 2, 4, ... neighbours: the middle step; mean, least and greatest.
    `smoothed` means are those over 1/40 of all points, as in the picture of plot.py run."""
    size = 1
    while size * MOST_ROWS < len(points):
        size *= 2
    groups = [points[first : first + size] for first in range(0, len(points), size)]
    steps = [group[len(group) // 2][0] for group in groups]
    values = [[value for _, value in group] for group in groups]
    means = [statistics.fmean(group) for group in values]
    if smoothed:
        means = smooth(means, len(means) // 80)
    return list(zip(steps, means, map(min, values), map(max, values), strict=True))


class Watcher:
    """What the page shows of the run in `folder`. Raises InputError if there is no such folder, or if it
    holds other things than a run; an empty folder may be one whose run has yet to begin."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.reader = LogReader(folder / "log.txt")
        self.lock = threading.Lock()  # of the reader
        if not folder.is_dir():
            raise InputError(f"there is no folder {folder}")
        if any(folder.iterdir()) and not any(True for name in RUN_FILES for _ in folder.glob(name)):
            read_log(folder / "log.txt")  # its error names runs that lie deeper
        self.reader.read()  # a long log now, not when the page asks

    def data(self) -> dict[str, Any]:
        """The contents of /data.json: curves as rows, the rest as the page shows it."""
        status, notes = read_status(self.folder), []
        try:
            run = read_run(self.folder)
        except InputError as error:
            run, notes = {}, [str(error)]
        with self.lock:  # two pages may ask at once
            self.reader.read()
            events = self.reader.log.events
            notes += self.reader.log.left_out("log.txt")
        last = {kind: points[-1] for kind, points in events.items() if points}
        if recent := events["train"][-20:]:
            last["train"] = recent[-1][0], statistics.fmean(loss for _, loss in recent)
        config = run.get("train_config", {})
        steps = max((step + (kind == "train") for kind, (step, _) in last.items()), default=0)
        finished = "result" in run or (not status and 0 < config.get("max_steps", 0) <= steps)
        name = self.folder.resolve().name
        return {
            "name": name,
            "caption": caption(self.folder, run).removeprefix(name).removeprefix(", "),
            "state": self.state(status, finished),
            "notes": notes,
            "numbers": numbers(steps, last, run, status, finished),
            "unit": "byte" if run.get("encoding") == "bytes" else "token",
            "tokens_per_step": config.get("total_batch_size"),
            "steps": steps,
            "max_steps": config.get("max_steps"),
            "curves": {kind: thin(points, kind not in ("val", "hella")) for kind, points in events.items()},
            "published": published_values([run]),
            **{key: status.get(key, []) for key in ("events", "samples", "samples_step")},
        }

    def state(self, status: dict[str, Any], finished: bool) -> tuple[str, str]:
        """A word for the run's state, and a sentence with its last sign of life: the time in status.json,
        which survives a copy, or log.txt's date."""
        seen = status.get("time")
        with contextlib.suppress(OSError):
            seen = seen or (self.folder / "log.txt").stat().st_mtime
        if finished:
            return "finished", "finished"
        if seen is None:
            return "waiting", "waiting for the run to begin"
        silence = max(0.0, time.time() - seen)  # the clocks of two machines may differ
        if status.get("ended"):
            return "stopped", f"stopped {duration(silence)} ago; --resume continues it"
        ago = f"last sign of life {duration(silence)} ago"
        if silence > max(SILENCE, 3 * status.get("step_seconds", 0)):
            return "silent", f"silent, {ago}: the run is dead, or this is an old copy"
        return "running", f"running, {ago}; {status.get('task') or 'training'}"


def numbers(
    steps: int,
    last: dict[str, tuple[int, float]],
    run: dict[str, Any],
    status: dict[str, Any],
    finished: bool,
) -> list[tuple[str, str]]:
    """The page's table: names and values, without those that are not known."""
    config, max_steps = run.get("train_config", {}), run.get("train_config", {}).get("max_steps")
    rows = {"step": f"{steps:,}" + (f" of {max_steps:,}, {steps / max_steps:.0%}" if max_steps else "")}
    if batch := config.get("total_batch_size"):
        rows["tokens"] = f"{steps * batch:,}"
    if "train" in last:
        rows[f"training loss ({plural(min(20, steps), 'step')})"] = f"{last['train'][1]:.4f}"
    if "val" in last:
        rows[f"validation loss (step {last['val'][0]:,})"] = f"{last['val'][1]:.4f}"
    if "hella" in last:
        (step, score), n = last["hella"], run.get("hellaswag_items")
        error = f" ± {standard_error(score, n):.4f}" if n else ""
        rows[f"HellaSwag (step {step:,})"] = f"{score:.4f}{error}"
    others = {kind: point for kind, point in last.items() if kind not in USUAL_KINDS}
    rows |= {f"{kind} (step {step:,})": f"{value:.4g}" for kind, (step, value) in others.items()}
    if rate := status.get("tokens_per_second") or run.get("result", {}).get("tokens_per_second"):
        rows["speed"] = f"{rate:,.0f} tokens/s" + (f", MFU {status['mfu']:.0%}" if status.get("mfu") else "")
    if "training_seconds" in status:
        rows["training"] = duration(status["training_seconds"])
        rows["evaluation, saving, start-up"] = duration(status["other_seconds"])
    left = {} if finished else status
    if "training_seconds_left" in left:
        rows["training left"] = duration(left["training_seconds_left"])
    if status.get("dollars") is not None:
        rows["cost"] = f"${status['dollars']:,.2f}"
    if left.get("dollars_left") is not None:
        rows["cost of the training left"] = f"${left['dollars_left']:,.2f}"
    return list(rows.items())


class Handler(BaseHTTPRequestHandler):
    """Answers this machine's browser."""

    server: "Server"

    def do_GET(self) -> None:
        """Answer with the page, its data, or an error."""
        # A browser sends the name that it asked for; one that another site made up must not reach the data.
        if self.headers.get("Host", "").rsplit(":", 1)[0] not in ("127.0.0.1", "localhost"):
            self.reply(403, "text/plain", "this page is only at 127.0.0.1 and localhost\n")
        elif self.path == "/":
            self.reply(200, "text/html", self.server.page)
        elif self.path == "/data.json":
            try:
                self.reply(200, "application/json", json.dumps(self.server.watcher.data()))
            except (AttributeError, KeyError, TypeError, ValueError) as error:  # JSON, but not a run's
                self.reply(500, "text/plain", f"run.json or status.json is damaged: {error!r}\n")
        else:
            self.reply(404, "text/plain", "there is nothing but /\n")

    def reply(self, status: int, content_type: str, text: str) -> None:
        body = text.encode()
        with contextlib.suppress(ConnectionError):  # the browser has gone
            self.send_response(status)
            self.send_header("Content-Type", f"{content_type}; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.send_header("Content-Security-Policy", POLICY)
            self.end_headers()
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing."""


class Server(ThreadingHTTPServer):
    """Serves the page of the run in `folder` to this machine. Raises InputError if there is nothing to watch,
    or if the port can't be had."""

    allow_reuse_address = os.name != "nt"  # on Windows, two servers could then share a port

    def __init__(self, folder: Path, port: int):
        self.watcher = Watcher(folder)
        self.page = Path(__file__).with_name("watch.html").read_text(encoding="utf-8")
        try:
            super().__init__(("127.0.0.1", port), Handler)
        except (OSError, OverflowError) as error:
            taken = getattr(error, "errno", None) == errno.EADDRINUSE
            reason = "another program uses it; name another" if taken else in_words(error)
            raise InputError(f"--port {port}: {reason}") from error


def serve(folder: Path, port: int) -> None:
    """Serve the page until Ctrl-C."""
    with Server(folder, port) as server, contextlib.suppress(KeyboardInterrupt):
        print(f"watching {folder} at http://127.0.0.1:{server.server_port}; Ctrl-C ends it", flush=True)
        server.serve_forever()
