"""A model by its hub name: fetched from a small server that answers as the hub does."""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

import pytest
from reference.client import PyLateReference

COMMIT = "beefc0ffee" * 4
READS_AND_PRINTS = """
import sys
from colbert_jax.huggingface import read_model, read_weights
model = read_model("owner/model", revision=sys.argv[1])
params = read_weights("owner/model", model, 0, revision=sys.argv[1])
print(model.config.embedding_size, float(abs(params["projection"][0]["kernel"]).sum()))
"""


class Handler(http.server.BaseHTTPRequestHandler):
    """A model's commit, its file list, and its files."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        root: Path = self.server.root
        self.server.seen.append(path)
        files = [p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()]
        prefix = f"/owner/model/resolve/{COMMIT}/"
        if path in ("/api/models/owner/model/revision/v1", "/api/models/owner/model"):
            siblings = [{"rfilename": name} for name in files]
            self.answer(json.dumps({"id": "owner/model", "sha": COMMIT, "siblings": siblings}))
        elif path.startswith("/api/models/owner/model/tree/"):
            entries = [
                {"type": "file", "path": n, "size": (root / n).stat().st_size, "oid": "0"}
                for n in files
            ]
            self.answer(json.dumps(entries))
        elif path.startswith(prefix) and path.removeprefix(prefix) in files:
            body = (root / path.removeprefix(prefix)).read_bytes()
            self.answer(body, {"X-Repo-Commit": COMMIT, "ETag": hashlib.sha256(body).hexdigest()})
        else:
            self.answer("", {"X-Error-Code": "RepoNotFound"}, status=404)

    def answer(self, body: str | bytes, headers: dict | None = None, status: int = 200) -> None:
        body = body.encode() if isinstance(body, str) else body
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(
    pylate: PyLateReference, tokenizer_file: Path, tmp_path: Path
) -> Iterator[http.server.ThreadingHTTPServer]:
    root = tmp_path / "model"
    pylate.call("make_model", folder=str(root), tokenizer_json=str(tokenizer_file))
    (root / "pytorch_model.bin").write_bytes(b"pickled")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.root, server.seen = root, []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parity
def test_a_pylate_model_is_fetched_by_name_and_revision_without_anything_pickled(
    server: http.server.ThreadingHTTPServer, tmp_path: Path
) -> None:
    environment = os.environ | {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_address[1]}",
        "HF_HOME": str(tmp_path / "hub"),
        "HF_HUB_OFFLINE": "0",
        "NO_PROXY": "127.0.0.1",
    }
    ran = subprocess.run(
        [sys.executable, "-c", READS_AND_PRINTS, "v1"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    size, total = ran.stdout.split()
    assert int(size) == 128
    assert float(total) > 0
    fetched = [path for path in server.seen if "/resolve/" in path]
    assert any(path.endswith("1_Dense/model.safetensors") for path in fetched)
    assert not any(path.endswith((".bin", ".md")) for path in fetched)
