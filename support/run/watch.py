"""
A page for the browser on this machine: how a run is doing, read from the files in its folder.

The server answers two addresses: / with watch.html, and /data.json with all that the page shows. It needs no
process of the run, so a copy of the folder, or one mounted from another machine, will do.
"""

import contextlib
import json
import os
import statistics
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from support.cli import InputError, duration, in_words, plural
from support.run import curves

MOST_ROWS = 1000  # per curve: a chart has not many more pixels
SILENCE = 300  # seconds; a run may be as silent in a save
RUN_FILES = ("log.txt", "run.json", "status.json", ".lock", "checkpoint_*")
# The page loads nothing from elsewhere.
POLICY = (
    "default-src 'none'; connect-src 'self'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src data:"
)


def thin(points: curves.Points, smoothed: bool = False) -> list[tuple[int, float, float, float]]:
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
        means = curves.smooth(means, len(means) // 80)
    return list(zip(steps, means, map(min, values), map(max, values), strict=True))


class Watcher:
    """What the page shows of the run in `folder`. Raises InputError if there is no such folder, or if it
    holds other things than a run; an empty folder may be one whose run has yet to begin."""

    def __init__(self, folder: Path):
        self.folder = folder
        if not folder.is_dir():
            raise InputError(f"there is no folder {folder}")
        if any(folder.iterdir()) and not any(True for name in RUN_FILES for _ in folder.glob(name)):
            curves.load_log(folder / "log.txt")  # the error names runs that lie deeper

    def data(self) -> dict[str, Any]:
        """The contents of /data.json: curves as rows, the rest as the page shows it."""
        log, status = self.folder / "log.txt", curves.read_status(self.folder)
        events, notes = (
            curves.load_log(log) if log.exists() else ({kind: [] for kind in curves.USUAL_KINDS}, [])
        )
        try:
            run = curves.read_run(self.folder)
        except InputError as error:
            run, notes = {}, [str(error), *notes]
        last = {kind: points[-1] for kind, points in events.items() if points}
        if recent := events["train"][-20:]:
            last["train"] = recent[-1][0], statistics.fmean(loss for _, loss in recent)
        config = run.get("train_config", {})
        steps = max((step + (kind == "train") for kind, (step, _) in last.items()), default=0)
        finished = "result" in run or (not status and 0 < config.get("max_steps", 0) <= steps)
        return {
            "name": self.folder.resolve().name,
            "caption": curves.caption("", run),
            "state": self.state(status, finished),
            "notes": notes,
            "numbers": numbers(steps, last, run, status),
            "unit": curves.unit_of(run),
            "tokens_per_step": config.get("total_batch_size"),
            "steps": steps,
            "max_steps": config.get("max_steps"),
            "curves": {
                curves.TITLES.get(kind, kind): thin(points, kind not in ("val", "hella"))
                for kind, points in events.items()
                if kind not in curves.NOT_DRAWN
            },
            "published": curves.published_values([run]),
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
        if status.get("task") == "starting":
            return "starting", f"started again {duration(silence)} ago, not in its first step yet"
        ago = f"last sign of life {duration(silence)} ago"
        if silence > max(SILENCE, 3 * status.get("step_seconds", 0)):
            return "silent", f"silent, {ago}: the run is dead, or this is an old copy"
        return "running", f"running, {ago}; {status.get('task') or 'training'}"


def numbers(
    steps: int, last: dict[str, tuple[int, float]], run: dict[str, Any], status: dict[str, Any]
) -> list[tuple[str, str]]:
    """The page's table: names and values, without those that are unknown or 0. `last` has the last step and
    value of each kind."""
    config, n_items = run.get("train_config", {}), run.get("hellaswag_items")
    max_steps, batch = config.get("max_steps"), config.get("total_batch_size")
    rows = {"step": f"{steps:,}" + (f" of {max_steps:,}, {steps / max_steps:.0%}" if max_steps else "")}
    if batch:
        rows["tokens"] = f"{steps * batch:,}"
    if (plan := curves.plan_of(config)) and "result" not in run:
        rows["learning rate"] = plan
    names = {"train": "training loss", "val": "validation loss", "hella": "HellaSwag"}
    for kind, (step, value) in last.items():
        if kind in curves.NOT_DRAWN:
            continue
        when = plural(min(20, steps), "step") if kind == "train" else f"step {step:,}"
        error = f" ± {curves.standard_error(value, n_items):.4f}" if kind == "hella" and n_items else ""
        number = f"{value:.4f}{error}" if kind in names else f"{value:.4g}"
        rows[f"{names.get(kind, curves.TITLES.get(kind, kind))} ({when})"] = number
    if rate := status.get("tokens_per_second") or run.get("result", {}).get("tokens_per_second"):
        rows["speed"] = f"{rate:,.0f} tokens/s" + (f", MFU {status['mfu']:.0%}" if status.get("mfu") else "")
    times = {
        "training": status.get("training_seconds"),
        "evaluation, saving, start-up": status.get("other_seconds"),
        "training left": status.get("training_seconds_left"),  # 0 at the end
    }
    costs = {"cost": status.get("dollars"), "cost of the training left": status.get("dollars_left")}
    rows |= {name: duration(seconds) for name, seconds in times.items() if seconds}
    rows |= {name: f"${dollars:,.2f}" for name, dollars in costs.items() if dollars}
    return list(rows.items())


class Handler(BaseHTTPRequestHandler):
    """Answers this machine's browser."""

    server: "Server"

    def do_GET(self) -> None:
        """Answer with the page, its data, or an error."""
        # Another site may have made up a name for this machine; a browser sends it along.
        if self.headers.get("Host", "").rsplit(":", 1)[0] not in ("127.0.0.1", "localhost"):
            self.reply(403, "text/plain", "this page is only at 127.0.0.1 and localhost\n")
        elif self.path == "/":
            self.reply(200, "text/html", self.server.page)
        elif self.path == "/data.json":
            try:
                self.reply(200, "application/json", json.dumps(self.server.watcher.data()))
            except (InputError, OSError) as error:  # say, a folder of another machine that went away
                self.reply(500, "text/plain", f"{in_words(error)}\n")
            except (AttributeError, KeyError, TypeError, ValueError) as error:  # JSON of something else
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

    allow_reuse_address = os.name != "nt"  # on Windows it would let two servers share a port

    def __init__(self, folder: Path, port: int):
        self.watcher = Watcher(folder)
        self.page = Path(__file__).with_name("watch.html").read_text(encoding="utf-8")
        try:
            super().__init__(("127.0.0.1", port), Handler)
        except (OSError, OverflowError) as error:
            raise InputError(f"--port {port}: name another ({in_words(error)})") from error


def serve(folder: Path, port: int) -> None:
    """Serve the page until Ctrl-C."""
    with Server(folder, port) as server, contextlib.suppress(KeyboardInterrupt):
        print(f"watching {folder} at http://127.0.0.1:{server.server_port}; Ctrl-C ends it", flush=True)
        server.serve_forever()
