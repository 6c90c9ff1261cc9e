"""
A Hugging Face Hub on the loopback interface: enough of its API to download the files of a repository, and,
where asked to, not in one piece.
"""

import hashlib
import http.server
import json
import re
import threading
import time
import urllib.parse
from contextlib import contextmanager
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, status: int, body: bytes, **headers: str):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self):
        time.sleep(self.server.delay)
        self.server.requests.append((self.command, self.path, self.headers.get("Range")))
        path = urllib.parse.unquote(self.path.split("?")[0])
        if found := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
            kind, name, _ = found.groups()
            folder = self.server.folder / kind / name
            if folder.is_dir():
                files = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
                info = {
                    "id": name,
                    "sha": COMMIT,
                    "siblings": [{"rfilename": file} for file in files],
                    "private": False,
                    "tags": [],
                    "downloads": 0,
                    "likes": 0,
                }
                return self.answer(200, json.dumps(info).encode(), Content_Type="application/json")
        if found := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)/tree/([^/]+)(?:/(.*))?", path):
            kind, name, _, under = found.groups()
            folder = self.server.folder / kind / name / (under or "")
            if folder.is_dir():
                entries = []
                for p in sorted(folder.rglob("*")):
                    path, size = p.relative_to(self.server.folder / kind / name).as_posix(), p.stat().st_size
                    entry = {"type": "directory", "path": path, "size": size, "oid": "0" * 40}
                    if p.is_file():
                        digest = hashlib.sha256(p.read_bytes()).hexdigest()
                        entry |= {"type": "file", "lfs": {"oid": digest, "size": size, "pointerSize": 1}}
                    entries.append(entry)
                return self.answer(200, json.dumps(entries).encode(), Content_Type="application/json")
        if found := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            kind, name, _, file = found.groups()
            file = self.server.folder / ("datasets" if kind else "models") / name / file
            if file.is_file():
                return self.send_file(file)
            return self.answer(404, b"", X_Error_Code="EntryNotFound")
        return self.answer(404, b'{"error":"Repository not found"}', X_Error_Code="RepoNotFound")

    def send_file(self, file: Path):
        body = file.read_bytes()
        headers = {
            "ETag": f'"{hashlib.sha256(body).hexdigest()}"',
            "X-Repo-Commit": COMMIT,
            "Accept-Ranges": "bytes",
        }
        faults = self.server.faults.get(file.name, [])
        if faults[:1] == ["gated"]:
            return self.answer(403, b"", X_Error_Code="GatedRepo")
        fault = faults.pop(0) if faults and self.command == "GET" else None
        if fault in ("500", "404"):
            return self.answer(int(fault), b"")
        if fault == "wrong":
            body = bytes([body[0] ^ 1]) + body[1:]
        start = 0
        if found := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            start = int(found[1])
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        if fault not in ("cut", "stall", "slow"):
            return self.answer(206 if start else 200, body[start:], **headers)
        self.send_response(206 if start else 200)
        for name, value in {"Content-Length": str(len(body) - start), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        half = (start + len(body)) // 2
        self.wfile.write(body[start:half])
        self.wfile.flush()
        if fault != "cut":
            time.sleep(self.server.stall)
        if fault == "slow":
            self.wfile.write(body[half:])
        self.close_connection = fault != "slow"

    do_HEAD = do_GET


@contextmanager
def serve(folder: Path, faults: dict[str, list[str]] | None = None, stall: float = 5, delay: float = 0):
    """Serve `folder` (models/OWNER/NAME/... and datasets/OWNER/NAME/...); yields environment variables that
    make the libraries talk to it, and the list of requests it got.

    `faults` says, for the name of a file, what its first downloads meet: "cut" (half of it, then the
    connection ends), "stall" (half of it, then nothing for `stall` seconds), "slow" (the other half follows
    then), "wrong" (another first byte), "500", "404"; and "gated": refused until the fault is taken away.
    Every answer begins after `delay` seconds.
    """
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.folder, server.requests, server.stall, server.delay = folder, [], stall, delay
    server.faults = {} if faults is None else faults
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()  # polls, seconds
    try:
        endpoint = f"http://127.0.0.1:{server.server_port}"
        yield (
            {
                "HF_ENDPOINT": endpoint,
                "HF_HOME": str(folder / "cache"),
                "HF_HUB_DISABLE_XET": "1",
                "HF_HUB_DISABLE_TELEMETRY": "1",
                "NO_PROXY": "*",
            },
            server.requests,
        )
    finally:
        server.shutdown()
        server.server_close()
