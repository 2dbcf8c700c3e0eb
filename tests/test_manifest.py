"""A manifest knows a folder's files to the byte, and is never itself half there."""

import shutil
from pathlib import Path

import pytest

from colbert_jax.manifest import MANIFEST, find_damage, is_sealed, note, read_notes, seal


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two items, and two files beside them."""
    for name in ("params/d/1", "params/shapes", "optimizer/d/1", "done", "times"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(name.encode() * 1000)
    (tmp_path / "params" / "empty").touch()
    return tmp_path


def test_every_bit_of_every_file_is_known(folder: Path) -> None:
    assert not is_sealed(folder)
    seal(folder, beside_items=True)
    assert is_sealed(folder) and find_damage(folder) == ""
    files = [path for path in folder.rglob("*") if path.is_file() and path.stat().st_size]
    assert len(files) == 6
    for path in files:
        whole, name = path.read_bytes(), path.relative_to(folder).as_posix()
        for place in (0, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
            what = "cannot be read" if name == MANIFEST else "has other bytes"
            assert find_damage(folder) == f"{name} {what}"
        path.write_bytes(whole[:-1])
        assert find_damage(folder).startswith(name)
        path.write_bytes(whole)
    assert find_damage(folder) == ""


def test_what_is_wrong_is_said(folder: Path) -> None:
    seal(folder, beside_items=True)
    (folder / "params" / "empty").unlink()
    assert find_damage(folder) == "params/empty is missing"
    (folder / "params" / "d" / "1").write_bytes(b"123")
    assert find_damage(folder) == "params/d/1 has 3 bytes and not 10,000, and 1 more"
    assert find_damage(folder, ("optimizer",)) == ""
    (folder / "times").write_text("later")
    assert find_damage(folder, ("optimizer",)) == "times has 5 bytes and not 5,000"
    (folder / MANIFEST).write_text("")
    assert find_damage(folder) == "manifest.json cannot be read"
    (folder / MANIFEST).write_text("[]")
    assert find_damage(folder) == "manifest.json cannot be read"


def test_files_beside_the_items_can_be_added_later(folder: Path) -> None:
    seal(folder, beside_items=False)
    (folder / "done").write_text("now")  # not known yet, so that it may change
    assert find_damage(folder) == ""
    (folder / "params" / "shapes").write_text("now")  # known, and not taken as it is later
    seal(folder, beside_items=True)
    assert find_damage(folder) == "params/shapes has 3 bytes and not 13,000"
    (folder / "done").unlink()
    assert find_damage(folder, ("optimizer",)) == "done is missing"


def test_notes_come_later_stay_and_are_known_to_the_byte(folder: Path) -> None:
    assert read_notes(folder) == {}
    seal(folder, beside_items=False)
    note(folder, {"value": 0.25})
    note(folder, {"of": "MAP"})
    (folder / "late").mkdir()
    (folder / "late" / "file").write_text("new")
    seal(folder, beside_items=True)
    assert read_notes(folder) == {"value": 0.25, "of": "MAP"} and find_damage(folder) == ""
    whole = (folder / MANIFEST).read_text()
    (folder / MANIFEST).write_text(whole.replace("0.25", "0.75"))
    assert find_damage(folder) == "manifest.json cannot be read" and read_notes(folder) == {}


def test_a_manifest_that_could_not_be_written_leaves_the_one_before(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seal(folder, beside_items=False)
    before = (folder / MANIFEST).read_bytes()
    (folder / "new").mkdir()
    (folder / "new" / "file").write_text("new")

    def full(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", full)
        with pytest.raises(OSError, match="No space left"):
            seal(folder, beside_items=False)
    assert (folder / MANIFEST).read_bytes() == before
    shutil.rmtree(folder / "new")
    seal(folder, beside_items=False)
    assert find_damage(folder) == ""
