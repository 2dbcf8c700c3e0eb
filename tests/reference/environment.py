"""Make, once, the Python environment that PyLate runs in.

PyLate needs older Transformers than colbert_jax does, so the two cannot share an environment. The
parity tests make PyLate's on their first run and keep it in the folder `.reference`.
"""

import fcntl
import hashlib
import logging
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

PYLATE = "pylate==1.6.0"
OVERRIDE = "COLBERT_JAX_PYLATE_PYTHON"
REQUIREMENTS = Path(__file__).with_name("requirements.txt")
STORE = Path(__file__).resolve().parents[2] / ".reference"
MARKER = "complete"

_LOG = logging.getLogger(__name__)
_LAST_LINES = 30
_HIDDEN = ("PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP", "VIRTUAL_ENV", "__PYVENV_LAUNCHER__")


def pylate_python(report: Callable[[str], None] = _LOG.warning) -> Path:
    """Return an interpreter that can import PyLate, making its environment if there is none.

    Args:
        report: Gets one line when the environment has to be made, which takes a minute or two.

    Returns:
        The interpreter named by `COLBERT_JAX_PYLATE_PYTHON`, or that of the kept environment.

    Raises:
        RuntimeError: The environment could not be made; the message ends with pip's last lines.
    """
    if override := os.environ.get(OVERRIDE):
        if not os.access(override, os.X_OK):
            raise RuntimeError(f"{OVERRIDE} names no interpreter: {override}")
        return Path(override).absolute()
    folder = STORE / f"pylate-{_fingerprint()}"
    # The path is not resolved: an interpreter finds its environment by the link it is started by.
    python = folder / "bin" / "python"
    if _is_ready(folder, python):
        return python
    STORE.mkdir(parents=True, exist_ok=True)
    with _locked(STORE / f"{folder.name}.lock"):
        if not _is_ready(folder, python):  # another run may have made it while this one waited
            _build(folder, python, report)
    return python


def child_environment() -> dict[str, str]:
    """Return the variables for the reference's processes.

    They keep it off the network and off any accelerator, and hide this interpreter's packages.
    """
    variables = {key: value for key, value in os.environ.items() if key not in _HIDDEN}
    variables |= {
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "PYTHONNOUSERSITE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    return variables


def _is_ready(folder: Path, python: Path) -> bool:
    """Say whether the environment was made to its end and its base interpreter is still there."""
    return (folder / MARKER).exists() and python.exists()


def _fingerprint() -> str:
    """Return a name for what the environment holds, so that a changed list makes a new one."""
    parts = [
        REQUIREMENTS.read_text(encoding="utf-8"),
        PYLATE,
        sys.version,
        sysconfig.get_platform(),
    ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock on the file, which the system drops should this process die."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _build(folder: Path, python: Path, report: Callable[[str], None]) -> None:
    """Make the environment in place, since one cannot be moved, and mark it complete at the end."""
    report(f"making the PyLate environment in {folder} (a minute or two)")
    started = time.monotonic()
    if folder.exists():  # an earlier run was cut off, or the base interpreter has gone
        shutil.rmtree(folder)
    pip = [str(python), "-m", "pip", "--quiet", "--disable-pip-version-check", "--no-input"]
    _run([sys.executable, "-m", "venv", str(folder)])
    _run([*pip, "install", "-r", str(REQUIREMENTS)])
    _run([*pip, "install", "--no-deps", PYLATE])
    (folder / MARKER).write_text(f"made in {time.monotonic() - started:.0f} s\n", encoding="utf-8")


def _run(command: list[str]) -> None:
    """Run a command, and raise with the last lines it printed if it fails."""
    done = subprocess.run(
        command,
        env=child_environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode:
        tail = "\n".join(done.stdout.splitlines()[-_LAST_LINES:])
        raise RuntimeError(
            f"cannot make the PyLate environment: {' '.join(command)}"
            f" ended with status {done.returncode}:\n{tail}"
        )
