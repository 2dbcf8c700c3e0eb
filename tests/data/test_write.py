"""Files of rows appear whole or not at all, and give back what was written."""

import errno
import gzip
import json
import os
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from colbert_jax.data import write as write_module
from colbert_jax.data.rows import read_rows
from colbert_jax.data.write import SUFFIXES, check_output, open_writer
from colbert_jax.errors import UserError

ODD = [
    "plain",
    "two\nlines\r\nand a\ttab",
    "line\u2028separator\u2029and\x85others",
    'quotes " and \\ and \x00 nul',
    "日本語 מִלָּה 👨‍👩‍👧 e\u0301",
    " spaces around ",
]


def rows_of(kind: str, count: int) -> list[dict[str, Any]]:
    rng = random.Random(0)
    rows: list[dict[str, Any]] = []
    for i in range(count):
        texts = [f"{rng.choice(ODD)} {i} {j}" for j in range(rng.randrange(1, 4))]
        row: dict[str, Any] = {"query": f"{ODD[i % len(ODD)]} {i}"}
        if kind == "pairs":
            row |= {"document": texts[0]}
        elif kind == "mined":
            row |= {"document": texts[0], "negative": texts[1:]}
        else:
            scores = [float(rng.randrange(-3, 3)) for _ in texts]
            row |= {"documents": texts, "scores": scores}
        rows.append(row)
    return rows


def read_back(path: Path) -> list[dict[str, Any]]:
    found = []
    for number, row in read_rows(path):
        assert isinstance(row, dict), row
        found.append(row)
        assert number == len(found)
    return found


def as_read(row: dict[str, Any]) -> dict[str, Any]:
    documents = row.get("documents") or [row["document"], *row.get("negative", [])]
    return {"query": row["query"], "documents": documents, "scores": row.get("scores")}


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("kind", ["pairs", "mined", "scored"])
def test_rows_come_back_as_they_were_written(suffix: str, kind: str, tmp_path: Path) -> None:
    rows = rows_of(kind, 2500)  # more than two batches of Parquet
    path = tmp_path / f"rows{suffix}"
    with open_writer(path) as write:
        for row in rows:
            write(row)
        assert not path.exists()
    assert read_back(path) == list(map(as_read, rows))
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_lists_may_be_empty_or_whole_numbers_for_long(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the first batch holds does not decide what later ones may hold."""
    monkeypatch.setattr(write_module, "_BATCH_ROWS", 2)
    mined = [{"query": "q", "document": "d", "negative": ["n"] * (i // 3)} for i in range(7)]
    scored = [
        {"query": "q", "documents": ["a", "b"], "scores": [1, 2] if i < 4 else [0.1, -2.5]}
        for i in range(6)
    ]
    for name, rows in (("mined", mined), ("scored", scored)):
        path = tmp_path / f"{name}{suffix}"
        with open_writer(path) as write:
            for row in rows:
                write(row)
        assert read_back(path) == list(map(as_read, rows))


def test_files_are_what_their_names_say(tmp_path: Path) -> None:
    row = {"query": "é", "document": "日本"}
    for suffix in SUFFIXES:
        with open_writer(tmp_path / f"rows{suffix}") as write:
            write(row)
    line = '{"query": "é", "document": "日本"}\n'
    assert (tmp_path / "rows.jsonl").read_text(encoding="utf-8") == line
    with gzip.open(tmp_path / "rows.jsonl.gz", "rt", encoding="utf-8") as file:
        assert file.read() == line
    assert pq.read_table(tmp_path / "rows.parquet").to_pylist() == [row]


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, UserError, GeneratorExit])
@pytest.mark.parametrize("count", [0, 1, 1500])
def test_what_is_not_finished_leaves_nothing(
    suffix: str, error: type[BaseException], count: int, tmp_path: Path
) -> None:
    with pytest.raises(error), open_writer(tmp_path / f"rows{suffix}") as write:
        for row in rows_of("mined", count):
            write(row)
        raise error("stopped")
    assert os.listdir(tmp_path) == []


def test_what_a_kill_left_is_no_hindrance(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    (tmp_path / ".rows.jsonl.unfinished").write_text("half a row that is longer than the next")
    with open_writer(path) as write:
        write({"query": "q", "document": "d"})
    assert read_back(path) == [{"query": "q", "documents": ["d"], "scores": None}]
    assert os.listdir(tmp_path) == ["rows.jsonl"]


# --- what users do wrong ---


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_what_exists_is_never_written_over(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows{suffix}"
    path.write_text("precious")
    for attempt in (lambda: check_output(path), lambda: open_writer(path).__enter__()):
        with pytest.raises(UserError, match=r"--output=.*rows.* exists: remove it, or choose"):
            attempt()
    assert path.read_text() == "precious" and os.listdir(tmp_path) == [path.name]
    (tmp_path / f"folder{suffix}").mkdir()
    with pytest.raises(UserError, match="exists"):
        check_output(tmp_path / f"folder{suffix}")


@pytest.mark.parametrize(
    "name, message",
    [
        ("rows.json", r"rows\.json: its name must end in one of \.jsonl, \.jsonl\.gz, \.parquet"),
        ("rows", "must end in one of"),
        ("rows.jsonl.bz2", "must end in one of"),
        ("none/rows.jsonl", r"there is no folder .*none; make it first"),
        ("file/rows.jsonl", r"there is no folder .*file; make it first"),
        ("x" * 300 + ".jsonl", r"cannot be written \(File name too long\): choose another name"),
    ],
)
def test_an_output_that_cannot_be_is_the_users_error(
    name: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("a file")
    with pytest.raises(UserError, match=message) as caught:
        check_output(tmp_path / name)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=message), open_writer(tmp_path / name):
        pass
    assert os.listdir(tmp_path) == ["file"]


def test_a_folder_that_may_not_be_written_is_found_out_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    allowed = os.access
    monkeypatch.setattr(
        os, "access", lambda path, mode: path != tmp_path and allowed(path, mode)
    )  # root may write to every folder
    with pytest.raises(UserError, match=r"you may not write to .*; choose another folder"):
        check_output(tmp_path / "rows.jsonl")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_full_disk_is_the_users_error_and_leaves_nothing(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    class Full:
        def __init__(self, write: Any):
            self.write = write

        def __call__(self, *args: Any, **more: Any) -> Any:
            raise full

    if suffix == ".parquet":
        monkeypatch.setattr(pq.ParquetWriter, "write_table", Full(None))
    else:
        monkeypatch.setattr(json, "dumps", Full(None))
    with (
        pytest.raises(UserError, match=r"rows.* cannot be written \(No space left on device\)"),
        open_writer(tmp_path / f"rows{suffix}") as write,
    ):
        write({"query": "q", "document": "d"})
    assert os.listdir(tmp_path) == []


def test_an_error_without_a_number_still_says_what_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*args: Any) -> None:
        raise pa.ArrowIOError("the disk is on fire")

    monkeypatch.setattr(pq.ParquetWriter, "write_table", failing)
    with (
        pytest.raises(UserError, match=r"cannot be written \(the disk is on fire\)"),
        open_writer(tmp_path / "rows.parquet") as write,
    ):
        write({"query": "q", "document": "d"})


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_disk_that_is_really_full(suffix: str) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("this system has no /dev/full")
    opened = []
    with pytest.MonkeyPatch.context() as patched:
        # The unfinished file is a device that has no room.
        def full(self: Path, name: str) -> Path:
            opened.append(name)
            return Path("/dev/full")

        patched.setattr(Path, "with_name", full)
        patched.setattr(Path, "unlink", lambda self, missing_ok=False: None)
        patched.setattr(Path, "replace", lambda self, other: pytest.fail("it was moved"))
        with (
            pytest.raises(UserError, match=r"cannot be written \(.*No space left on device"),
            open_writer(Path(f"rows{suffix}")) as write,
        ):
            for row in rows_of("mined", 3000):
                write(row)
    assert opened == [f".rows{suffix}.unfinished"]
