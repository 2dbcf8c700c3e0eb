"""The checks before a commit find what they are for, and are those that CI makes."""

import re
import runpy
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
HOOKS = ".pre-commit-config.yaml"
CLEAN = {
    "colbert_jax/__init__.py": '"""A package."""\n',
    "colbert_jax/half.py": '"""A number."""\n\n\ndef half(x: int) -> float:\n    """Half."""\n'
    "    return x / 2\n",
    "launch/go.sh": '#!/bin/bash\necho "$1"\n',
}
BROKEN = {
    "ruff check": ("colbert_jax/half.py", '"""A number."""\n\nimport os\n', "F401"),
    "ruff format": (
        "colbert_jax/half.py",
        '"""A number."""\n\nx = [1,2]\n',
        "would be reformatted",
    ),
    "mypy": (
        "colbert_jax/half.py",
        CLEAN["colbert_jax/half.py"].replace("x / 2", '"x"'),
        "Incompatible return value",
    ),
    "shellcheck": ("launch/go.sh", "#!/bin/bash\necho $1\n", "SC2086"),
}


def checked(folder: Path) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "pre_commit", "run", "--all-files"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=240,
        env={"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "HOME": str(folder.parent)},
    )
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    folder = tmp_path / "repository"
    for name, text in CLEAN.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    for name in (HOOKS, "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    for command in (["init", "-q"], ["add", "-A"]):
        subprocess.run(["git", *command], cwd=folder, check=True)
    return folder


def test_clean_files_pass(repository: Path) -> None:
    status, said = checked(repository)
    assert status == 0 and said.count("Passed") == len(BROKEN), said


@pytest.mark.parametrize("hook", BROKEN)
def test_each_hook_finds_what_it_is_for(hook: str, repository: Path) -> None:
    name, text, found = BROKEN[hook]
    (repository / name).write_text(text)
    status, said = checked(repository)
    assert status != 0 and found in said, said
    assert re.search(rf"^{hook}\.+Failed", said, re.M), said


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="coverage traces threads otherwise there")
def test_coverage_traces_no_thread_that_tracing_could_end() -> None:
    assert threading.gettrace() is None  # tests/conftest.py says why


def test_ci_makes_the_same_checks() -> None:
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    (repository,) = yaml.safe_load((ROOT / HOOKS).read_text(encoding="utf-8"))["repos"]
    entries = [hook["entry"].replace(" --force-exclude", "") for hook in repository["hooks"]]
    assert len(entries) == len(BROKEN)
    # Shell scripts are held against shellcheck by tests/launch, all of them.
    assert [e for e in entries if e != "shellcheck" and not any(e in line for line in ci)] == []
    assert any(line.startswith("python -m pytest") for line in ci)
    assert any(".ci/lowest" in line for line in ci)


def test_every_requirement_has_a_lowest_version_to_be_tested_with(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import setuptools

    given: dict[str, Any] = {}
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: given.update(arguments))
    runpy.run_path(str(ROOT / "setup.py"))
    required = given["install_requires"]
    assert len(required) > 20
    assert [r for r in required if not re.fullmatch(r"[\w-]+>=\d[\d.]*(,<\d+)?", r)] == []
