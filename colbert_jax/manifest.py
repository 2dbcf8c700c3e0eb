"""What a checkpoint consists of: each file's size and SHA-256, kept in `manifest.json` beside them.

Orbax's formats do not notice everything: a flipped byte of a large array comes back as another
number, one of a JSON item as another position. What is found out about a checkpoint later is noted
here as well, since its own files stay as they were saved.

SHA-256, since processors have instructions for it: it took two thirds of BLAKE2b's time on an x86
core.
"""

import hashlib
import json
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"

_THREADS = 4  # hashing leaves Python's lock, and reading waits for the disk


def seal(folder: Path, beside_items: bool) -> None:
    """Adds the files of a folder that its manifest does not name yet; those it names stay as named.

    A kill while it writes leaves the manifest that was there before.

    Args:
      folder: a checkpoint.
      beside_items: whether to add also the files that lie in the folder itself; those of its
        subfolders, the items, are always added.

    Raises:
      OSError: a file cannot be read, or the manifest not be written.
    """
    known, notes = _read(folder) if is_sealed(folder) else ({}, {})
    partial = folder / f"{MANIFEST}.partial"
    new = [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and path not in (folder / MANIFEST, partial)
        and (beside_items or path.parent != folder)
        and path.relative_to(folder).as_posix() not in known
    ]
    with ThreadPoolExecutor(_THREADS) as threads:
        for path, digest in zip(new, threads.map(_sha256, new), strict=True):
            name = path.relative_to(folder).as_posix()
            known[name] = {"bytes": path.stat().st_size, "sha256": digest}
    _write(folder, known, notes)


def note(folder: Path, notes: dict[str, Any]) -> None:
    """Adds to what is noted of a sealed folder.

    Raises:
      OSError: the manifest cannot be written.
      ValueError: it is damaged.
    """
    known, before = _read(folder)
    _write(folder, known, before | notes)


def read_notes(folder: Path) -> dict[str, Any]:
    """What is noted of a folder; nothing where there is no manifest that can be read."""
    try:
        return _read(folder)[1]
    except (OSError, ValueError):
        return {}


def is_sealed(folder: Path) -> bool:
    """Whether a folder has a manifest."""
    return (folder / MANIFEST).is_file()


def find_damage(folder: Path, items: Collection[str] | None = None) -> str:
    """What is wrong with a sealed folder, as half a sentence; empty if nothing is.

    Args:
      folder: a checkpoint that `is_sealed`.
      items: the subfolders to look at beside the files in the folder itself; all, if None.
    """
    try:
        known, _ = _read(folder)
    except (OSError, ValueError):
        return f"{MANIFEST} cannot be read"
    names = [
        name for name in known if items is None or "/" not in name or name.split("/")[0] in items
    ]
    with ThreadPoolExecutor(_THREADS) as threads:
        found = threads.map(lambda name: _difference(folder, name, known[name]), names)
        wrong = [difference for difference in found if difference]
    if not wrong:
        return ""
    return wrong[0] + (f", and {len(wrong) - 1} more" if len(wrong) > 1 else "")


def _difference(folder: Path, name: str, known: dict) -> str:
    """What is wrong with one file; the size first, since that costs no reading."""
    try:
        size = (folder / name).stat().st_size
        if size != known["bytes"]:
            return f"{name} has {size:,} bytes and not {known['bytes']:,}"
        return "" if _sha256(folder / name) == known["sha256"] else f"{name} has other bytes"
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name} cannot be read: {error.strerror}"


def _read(folder: Path) -> tuple[dict[str, dict], dict[str, Any]]:
    """Path below the folder -> "bytes" and "sha256", and notes; ValueError if it is damaged."""
    content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{folder / MANIFEST} is no manifest")
    notes = content.get("notes", {})
    if content.get("sha256") != _own_sha256(content.get("files"), notes):
        raise ValueError(f"{folder / MANIFEST} has other bytes")
    return content["files"], notes


def _write(folder: Path, known: dict[str, dict], notes: dict[str, Any]) -> None:
    content = {"files": known, "sha256": _own_sha256(known, notes)}
    if notes:
        content["notes"] = notes
    partial = folder / f"{MANIFEST}.partial"
    partial.write_text(json.dumps(content, indent=1), encoding="utf-8")
    partial.replace(folder / MANIFEST)


def _own_sha256(known: dict[str, dict] | None, notes: dict[str, Any]) -> str:
    """So that damage to the manifest is not taken for damage to a file."""
    signed = [known, notes] if notes else known
    return hashlib.sha256(json.dumps(signed, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
