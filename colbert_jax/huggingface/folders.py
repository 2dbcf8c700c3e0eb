"""Where a model's files are: a folder or the hub, and the folders of its modules."""

import json
import reprlib
from pathlib import Path

import huggingface_hub

from colbert_jax.errors import UserError


def find_folder(name_or_path: str, revision: str | None = None, weights: bool = True) -> Path:
    """A local folder as it is, or a hub model downloaded (its configs and safetensors only).

    Args:
      name_or_path: the folder or the hub name.
      revision: the hub's revision, for a hub name.
      weights: whether the safetensors are wanted.

    Raises:
      UserError: neither a folder nor a model that the hub can deliver.
    """
    if Path(name_or_path).is_dir():
        return Path(name_or_path)
    try:
        folder = huggingface_hub.snapshot_download(
            name_or_path,
            revision=revision,
            allow_patterns=[
                f"{folder}*.{kind}"
                for folder in ("", "*/")
                for kind in ("json", *(["safetensors"] if weights else []))
            ],
        )
    except Exception as error:  # the hub client raises a dozen kinds; each means the same here
        raise UserError(
            f"{name_or_path!r} is neither a folder nor a model that could be fetched from the hub "
            f"({type(error).__name__}): check the name and the connection."
        ) from error
    return Path(folder)


def module_folders(folder: Path) -> tuple[Path, list[Path]]:
    """The transformer's folder and the Dense layers' folders, from `modules.json`."""
    if not (folder / "modules.json").is_file():
        return folder, []
    try:
        modules = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
        kinds = [(str(m["type"]).rsplit(".", 1)[-1], str(m["path"])) for m in modules]
    except (OSError, ValueError, TypeError, LookupError, RecursionError) as error:
        raise UserError(
            f"{folder / 'modules.json'} is not a list of modules: replace it."
        ) from error
    for _, path in kinds:
        if not _is_inside(folder, path):
            raise UserError(
                f"{folder / 'modules.json'} names {reprlib.repr(path)}, outside of the folder."
            )
    transformers = [folder / path for kind, path in kinds if kind == "Transformer"]
    return (transformers or [folder])[0], [folder / p for kind, p in kinds if kind == "Dense"]


def _is_inside(folder: Path, path: str) -> bool:
    try:
        (folder / path).stat()
    except FileNotFoundError:
        pass  # what is missing there is named when it is wanted
    except (OSError, ValueError):  # a zero byte, too long a name: nothing has it
        return False
    return (folder / path).resolve().is_relative_to(folder.resolve())
