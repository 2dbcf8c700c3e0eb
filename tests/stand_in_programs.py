"""What README.md and docs/ rely on and a test cannot have: other tools, and the Hugging Face hub.

A tool is a small program, first on PATH, that records its arguments and does what its caller relies
on. The hub is a server on this machine that serves folders.
"""

import hashlib
import http.server
import json
import os
import sys
import threading
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TESTS = Path(__file__).parent
sys.path.insert(0, str(TESTS / "launch"))  # as pytest does for the tests there

from stand_ins import recorder, write_program  # noqa: E402
from test_launch_scripts import SRUN, Pods  # noqa: E402

COMMIT = "c0ffee" * 6 + "beef"

# The `python` of a sandbox: our programs, made small, run in the warm Python; modules really run.
PYTHON = f"""
    #!python
    import json, os, subprocess, sys, tempfile
    sys.path.insert(0, {str(TESTS)!r})
    import small_sizes, warm_python

    given = sys.argv[1:]
    if given[0] == "-c":
        os.execv({sys.executable!r}, [{sys.executable!r}, *given])
    if given[:2] == ["-m", "pip"]:
        os.execvp("pip", ["pip", *given[2:]])
    if given[:3] == ["-m", "mkdocs", "serve"]:
        os.execvp("mkdocs-served-once", ["mkdocs-served-once"])
    program = small_sizes.name_of(given[0])
    added = small_sizes.added(program, given[1:])
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        if program == "-m":
            command = [{sys.executable!r}, *given, *added]
            status = subprocess.run(command, stdout=out, stderr=err).returncode
        else:
            warm = os.path.join(os.path.dirname(sys.argv[0]), "warm")  # for what it starts
            streams = out.fileno(), err.fileno()
            status = warm_python.call(os.environ["WARM"], [*given, *added], warm, *streams)
        said = []
        for file, stream in ((out, sys.stdout), (err, sys.stderr)):
            file.seek(0)
            said.append(file.read().decode(errors="replace"))
            stream.write(said[-1])
    call = {{"program": program, "arguments": given[1:], "added": added, "status": status}}
    call |= {{"out": said[0], "err": said[1], "host": os.environ.get("JAX_PROCESS_ID", "")}}
    with open(os.environ["CALLS"], "a") as file:
        file.write(json.dumps(call) + "\\n")
    sys.exit(status)
"""

# An interpreter that is warm, and nothing else: `sys.executable` of the programs, PyLate's Python.
WARM = f"""
    #!python
    import os, sys
    given = sys.argv[1:]
    if given[-1] == "--multiprocessing-fork":  # a process of a pool, behind Python's own flags
        given = given[given.index("-c") :]
    elif given[0].startswith("-"):
        os.execv(EXECUTABLE, [EXECUTABLE, *given])
    sys.path.insert(0, {str(TESTS)!r})
    import warm_python
    sys.exit(warm_python.call(ADDRESS, given, sys.argv[0]))
"""

# Records what stands in the pipe, too, and finds the pod of the first host.
KUBECTL = """
    #!python
    import json, os, sys
    told = sys.stdin.read() if sys.argv[1] == "apply" else ""
    with open(os.environ["RECORD"], "a") as file:
        file.write(json.dumps(["kubectl", sys.argv[1:], told]) + "\\n")
    if sys.argv[1] == "get":
        print("pod/colbert-jax-slice-0-0")
"""

ENVSUBST = """
    #!python
    import os, re, sys
    names = "|".join(re.findall(r"\\$(\\w+)", sys.argv[1]))
    text = sys.stdin.read()
    print(re.sub(r"\\$\\{(" + names + r")\\}", lambda found: os.environ[found[1]], text))
"""

# Starts the job at once, as on the first of its nodes.
SBATCH = """
    #!python
    import json, os, subprocess, sys
    options = dict(a[2:].split("=") for a in sys.argv[1:] if a.split("=")[0] in
                   ("--nodes", "--gpus-per-node"))
    script = next(a for a in sys.argv[1:] if not a.startswith("--"))
    rest = sys.argv[sys.argv.index(script) + 1 :]
    with open(os.environ["RECORD"], "a") as file:
        file.write(json.dumps(["sbatch", sys.argv[1:], options]) + "\\n")
    job = {"SLURM_JOB_ID": "4242", "SLURM_JOB_NODELIST": "node[1-2]", "PYTHON": "training"}
    job |= {"SLURM_NTASKS": options["nodes"], "SLURM_GPUS_ON_NODE": options["gpus-per-node"]}
    job |= {"SLURM_SUBMIT_DIR": os.getcwd()}
    sys.exit(subprocess.run(["bash", script, *rest], env=os.environ | job).returncode)
"""

# `mkdocs serve` runs until it is stopped: this stops it when it has shown the first page.
SERVED_ONCE = """
    #!python
    import os, socket, subprocess, sys, time, urllib.request
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = "127.0.0.1:%d" % free.getsockname()[1]
    command = [EXECUTABLE, "-m", "mkdocs", "serve", "--dev-addr=" + address]
    server = subprocess.Popen(command)
    try:
        for _ in range(600):
            try:
                page = urllib.request.urlopen("http://" + address + "/").read().decode()
                print("served:", page.partition("<title>")[2].partition("</title>")[0])
                break
            except OSError:
                time.sleep(0.1)
        else:
            sys.exit("it does not serve")
    finally:
        server.terminate()
        server.wait()
"""


def write_tools(folder: Path, *, warm: Path, pylate: tuple[Path, Path] | None) -> Path:
    """Writes all tools.

    Args:
      folder: that is made.
      warm: the socket of the warm Python.
      pylate: PyLate's interpreter and the socket of one that is warm; it is called PATH, as on
        the pages.

    Returns:
      Where the tools are, to be put on PATH.
    """
    tools = folder / "bin"
    own = WARM.replace("EXECUTABLE", repr(sys.executable)).replace("ADDRESS", repr(str(warm)))
    texts = {
        "python": PYTHON,
        "warm": own,
        "envsubst": ENVSUBST,
        "kubectl": KUBECTL,
        "sbatch": SBATCH,
        "srun": SRUN,
        "scontrol": "#!/bin/sh\necho node1; echo node2\n",
        "mkdocs-served-once": SERVED_ONCE.replace("EXECUTABLE", repr(sys.executable)),
    }
    texts |= {name: recorder(name) for name in ("docker", "hf", "pip", "training")}
    if pylate:
        python, address = (repr(str(path)) for path in pylate)
        texts["PATH"] = WARM.replace("EXECUTABLE", python).replace("ADDRESS", address)
    for name, text in texts.items():
        write_program(tools / name, text)
    return tools


def write_cloud(folder: Path, repository: Path, tools: Path) -> None:
    """Makes a cloud with pods, and the gcloud that uses it."""
    Pods(folder, repository)
    (tools / "gcloud").symlink_to(folder / "bin" / "gcloud")


# --- the hub ---


class _Hub(http.server.BaseHTTPRequestHandler):
    """Answers as the hub does: `models/OWNER/NAME` and `datasets/OWNER/NAME` are its folders."""

    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        parts = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path).strip("/").split("/")
        asked = parts[0] == "api"
        parts = parts[1:] if asked else parts
        kind = parts.pop(0) if parts[:1] in (["models"], ["datasets"]) else "models"
        folder = self.server.root.joinpath(kind, *parts[:2])  # type: ignore[attr-defined]
        if len(parts) < 2 or not folder.is_dir():
            self._send(404, b"", {"X-Error-Code": "RepoNotFound"})
        elif asked:
            names = [str(p.relative_to(folder)) for p in sorted(folder.rglob("*")) if p.is_file()]
            self._send(200, json.dumps(_facts("/".join(parts[:2]), names, parts[2:3])).encode(), {})
        elif not (file := folder.joinpath(*parts[4:])).is_file():
            self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
        else:
            data = file.read_bytes()
            headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha1(data).hexdigest()}"'}
            self._send(200, data, headers)

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def _facts(name: str, files: list[str], what: list[str]) -> object:
    """What the hub says of a repository, or of its tree of files."""
    if what == ["tree"]:
        return [{"type": "file", "path": file, "size": 1, "oid": "0"} for file in files]
    siblings = [{"rfilename": file} for file in files]
    return {"id": name, "sha": COMMIT, "private": False, "siblings": siblings}


@contextmanager
def serve_hub(root: Path) -> Iterator[str]:
    """Serves a folder as the hub; gives its address."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    server.root = root  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def online(address: str, home: Path) -> dict[str, str]:
    """This process's variables, for one that asks that hub and keeps all in a home of its own."""
    left_out = ("XLA_", "JAX_", "SLURM_", "HF_", "COLBERT_JAX_HOSTS")
    clean = {k: v for k, v in os.environ.items() if not k.startswith(left_out)}
    return clean | {
        "HF_ENDPOINT": address,
        "HF_HOME": str(home / "huggingface"),
        "HF_HUB_DISABLE_XET": "1",
        "HOME": str(home),
        "JAX_PLATFORMS": "cpu",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
        "TOKENIZERS_PARALLELISM": "false",
    }
