"""A Hugging Face Hub on the loopback interface: enough of its API to download the files of a repository."""

import hashlib
import http.server
import json
import re
import threading
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
        self.server.requests.append((self.command, self.path))
        path = self.path.split("?")[0]
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
                entries = [
                    {
                        "type": "directory" if p.is_dir() else "file",
                        "path": p.relative_to(self.server.folder / kind / name).as_posix(),
                        "size": p.stat().st_size,
                        "oid": "0" * 40,
                    }
                    for p in sorted(folder.rglob("*"))
                ]
                return self.answer(200, json.dumps(entries).encode(), Content_Type="application/json")
        if found := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            kind, name, _, file = found.groups()
            file = self.server.folder / ("datasets" if kind else "models") / name / file
            if file.is_file():
                body = file.read_bytes()
                etag = f'"{hashlib.sha256(body).hexdigest()}"'
                return self.answer(200, body, ETag=etag, X_Repo_Commit=COMMIT, Accept_Ranges="bytes")
            return self.answer(404, b"", X_Error_Code="EntryNotFound")
        return self.answer(404, b'{"error":"Repository not found"}', X_Error_Code="RepoNotFound")

    do_HEAD = do_GET


@contextmanager
def serve(folder: Path):
    """Serve `folder` (models/OWNER/NAME/... and datasets/OWNER/NAME/...); yields environment variables that
    make the libraries talk to it, and the list of requests it got."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.folder, server.requests = folder, []
    threading.Thread(target=server.serve_forever, daemon=True).start()
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
