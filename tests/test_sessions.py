"""What a run notes of its sessions, which must never stop it."""

import importlib.metadata
import json
import sys
from pathlib import Path

import pytest

from colbert_jax.rates import Rates
from colbert_jax.sessions import note_session, read_sessions

PEAK = Rates(1e12, None, "measured")


def test_each_going_on_is_added_and_a_new_start_begins_anew(tmp_path: Path) -> None:
    note_session(tmp_path, 0, 8, PEAK, {"parameters": 1})
    note_session(tmp_path, 5, 4, PEAK, {"parameters": 2})
    found = json.loads((tmp_path / "run.json").read_text())
    assert [s["first_step"] for s in found["sessions"]] == [0, 5]
    assert [s["devices"] for s in found["sessions"]] == [8, 4]
    assert found["parameters"] == 2
    first = found["sessions"][0]
    assert first["command"] == sys.argv and first["backend"] == "cpu" and first["processes"] == 1
    assert first["versions"]["jax"] == importlib.metadata.version("jax")
    assert (first["peak_flops"], first["peak_flops_source"]) == (1e12, "measured")
    assert first["started"].endswith("+00:00") and first["device_kind"]
    note_session(tmp_path, 0, 8, PEAK, {})
    assert [s["first_step"] for s in read_sessions(tmp_path)] == [0]


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "3", '{"sessions": null}', '{"sessions": {"a": 1}}', '{"other": []}'],
)
def test_a_damaged_note_is_written_anew(text: str, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(text)
    assert read_sessions(tmp_path) == []
    note_session(tmp_path, 5, 1, PEAK, {})
    assert [s["first_step"] for s in read_sessions(tmp_path)] == [5]


def test_bytes_that_are_no_text_are_no_session(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_bytes(b"\xff\xfe\x00")
    assert read_sessions(tmp_path) == []


def test_a_package_that_goes_by_another_name_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = importlib.metadata.version

    def lacking(name: str) -> str:
        if name == "jaxlib":
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(importlib.metadata, "version", lacking)
    note_session(tmp_path, 0, 1, PEAK, {})
    versions = read_sessions(tmp_path)[0]["versions"]
    assert "jaxlib" not in versions and "numpy" in versions
