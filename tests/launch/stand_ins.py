"""Programs that stand in for those of a cloud or a cluster, and what to read of their runs."""

import json
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"


def write_program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(text).lstrip().replace("#!python", f"#!{sys.executable} -SE"))
    path.chmod(0o755)


def recorder(name: str) -> str:
    """A program that records its name, its arguments and what is told of JAX, and succeeds."""
    return f"""
        #!python
        import json, os, sys
        told = {{k: v for k, v in os.environ.items() if k.startswith(("JAX_", "COLBERT_", "XLA_"))}}
        with open(os.environ["RECORD"], "a") as file:
            file.write(json.dumps([{name!r}, sys.argv[1:], told]) + "\\n")
    """


def recorded(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def one_error(result: subprocess.CompletedProcess[str]) -> str:
    """The one sentence of a user's mistake."""
    assert result.returncode == 2, result.stderr
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ") and line.endswith(".") and result.stdout == ""
    return line


def wait_for(condition: Callable[[], Any], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
