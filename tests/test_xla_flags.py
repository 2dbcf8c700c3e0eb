"""XLA's flags: the user's win, XLA knows them and has other defaults, they come before devices."""

import fnmatch
import glob
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from colbert_jax.xla_flags import CHECKED_JAXLIB, FLAGS, Flag, find_platform, merge, set_flags

ROOT = Path(__file__).parents[1]
OURS = (Flag("xla_a", "true", "", ""), Flag("xla_b", "7", "", ""))


# --- the user's values and ours ---


def test_without_values_of_the_user_all_of_ours_are_set() -> None:
    assert merge("", OURS) == "--xla_a=true --xla_b=7"


@pytest.mark.parametrize("own", ["--xla_a=false", "--xla_a", "--noxla_a", "-xla_a=false"])
def test_a_value_of_the_user_wins(own: str) -> None:
    assert merge(f"--xla_c=1 {own}", OURS) == f"--xla_c=1 {own} --xla_b=7"


def test_a_flag_whose_name_begins_like_ours_is_another() -> None:
    assert merge("--xla_a_b=1 --other_xla_b=2", OURS).endswith("--xla_a=true --xla_b=7")


def test_nothing_is_set_twice() -> None:
    once = merge("--xla_b=1", OURS)
    assert merge(once, OURS) == once


def test_a_file_of_flags_stays_the_users() -> None:
    assert merge("/home/me/flags.txt", OURS) == "/home/me/flags.txt"


# --- the platform ---


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """A machine with the packages and device files that a test gives it."""
    has: dict[str, list[str]] = {"packages": [], "files": []}
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name in has["packages"] or None)
    monkeypatch.setattr(
        glob, "glob", lambda pattern: [f for f in has["files"] if fnmatch.fnmatch(f, pattern)]
    )
    return has


@pytest.mark.parametrize(
    ("packages", "files", "platform"),
    [
        ([], [], "cpu"),
        (["libtpu"], [], "cpu"),  # it compiles ahead of time
        ([], ["/dev/vfio/0"], "cpu"),  # another device
        (["libtpu"], ["/dev/accel0"], "tpu"),
        (["libtpu"], ["/dev/vfio/0"], "tpu"),
        (["jax_cuda12_plugin"], [], "cuda"),
        (["jax_cuda13_plugin"], [], "cuda"),
    ],
)
def test_the_platform_is_what_is_installed_and_there(
    machine: dict[str, list[str]], packages: list[str], files: list[str], platform: str
) -> None:
    machine |= {"packages": packages, "files": files}
    assert find_platform() == platform


@pytest.mark.parametrize(
    ("named", "platform"),
    [("cpu", "cpu"), ("tpu,cpu", "tpu"), ("cuda", "cuda"), ("rocm", "rocm"), ("gpu", "cuda")],
)
def test_the_platform_is_what_the_user_names_first(
    machine: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch, named: str, platform: str
) -> None:
    machine["packages"] = ["jax_cuda13_plugin", "libtpu"]
    machine["files"] = ["/dev/accel0"]
    monkeypatch.setenv("JAX_PLATFORMS", named)
    assert find_platform() == platform


# --- jaxlib and libtpu ---

READ_OPTIONS = """
from jaxlib import xla_client
options = xla_client.CompileOptions()
print(options.executable_build_options.debug_options)
"""


def python(program: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""} | variables
    return subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
        timeout=300,
    )


def test_the_table_is_checked_for_the_jaxlib_that_is_installed() -> None:
    assert importlib.metadata.version("jaxlib").startswith(CHECKED_JAXLIB), (
        "see that each flag of colbert_jax/xla_flags.py still exists, is no default and helps; "
        "then change CHECKED_JAXLIB"
    )


def test_jaxlib_knows_the_flags_and_has_other_defaults() -> None:
    ours = [flag for name in ("cpu", "cuda") for flag in FLAGS[name]]
    read, defaults = (python(READ_OPTIONS, XLA_FLAGS=flags) for flags in (merge("", ours), ""))
    assert read.returncode == defaults.returncode == 0, read.stderr + defaults.stderr
    for flag in ours:
        # A list that is set to nothing is not printed.
        line = f"{flag.name}: {flag.value}\n" if flag.value else f"{flag.name}: "
        assert (line in read.stdout) == bool(flag.value)
        assert (line in defaults.stdout) != bool(flag.value)


def test_jaxlib_ends_a_process_over_a_flag_that_it_does_not_know() -> None:
    """So that the test above can fail; and why nothing is set with another jaxlib."""
    ended = python(READ_OPTIONS, XLA_FLAGS="--xla_gpu_no_such_flag=true")
    assert ended.returncode != 0 and "xla_gpu_no_such_flag" in ended.stderr


def test_with_a_jaxlib_that_was_not_checked_nothing_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FLAGS, "cpu", OURS)
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.11.0")
    set_flags("cpu")
    assert os.environ["XLA_FLAGS"] == ""
    monkeypatch.setattr(importlib.metadata, "version", lambda name: f"{CHECKED_JAXLIB}9")
    set_flags("cpu")
    assert os.environ["XLA_FLAGS"] == "--xla_a=true --xla_b=7"


# --- the programs ---

COUNT_DEVICES = """
import jax
from colbert_jax import cli, xla_flags

xla_flags.FLAGS["cpu"] = (xla_flags.Flag("xla_force_host_platform_device_count", "3", "", ""),)
cli.run_program(lambda: print(jax.device_count()))
"""


@pytest.mark.parametrize(
    ("own", "devices"), [("", "3"), ("--xla_force_host_platform_device_count=2", "2")]
)
def test_a_program_has_the_flags_before_it_touches_a_device(own: str, devices: str) -> None:
    assert python(COUNT_DEVICES, XLA_FLAGS=own).stdout.split() == [devices]


@pytest.mark.parametrize(
    "name", ["train", "evaluate", "mine", "score", "search", "profile_step", "compile"]
)
def test_the_programs_that_use_devices_start_that_way(name: str) -> None:
    assert "    cli.run_program(main" in (ROOT / "launch" / f"{name}.py").read_text()
