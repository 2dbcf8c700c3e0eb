"""Runs of a few steps, for tests of what goes on around the steps."""

import ast
import json
import runpy
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

CONFIGS = Path(__file__).parents[1] / "configs"
STEPS = 2


def tiny_config(
    name: str, init_from: Path | str, files: Sequence[Path | str], cache: Path, **changes: Any
) -> ConfigDict:
    """A real config, `configs/<name>.py`, made small as by overrides; `changes` come last."""
    config = runpy.run_path(str(CONFIGS / f"{name}.py"))["get_config"]()
    config.update(
        {
            "total_steps": STEPS,
            "init_from": str(init_from),
            "log_every_steps": 1,
            "export": False,
            "compilation_cache": "",
            "input": {"batch_size": 8, "cache_dir": str(cache), "threads": 1},
            "model": {"dtype": "float32", "query_length": 12, "document_length": 20, "lengths": 1},
            "optimizer": {"learning_rate": 1e-3},
            "checkpoint": {"every_steps": 0},
        }
    )
    config.input.files = tuple(map(str, files))
    config.update(changes)
    return config


def printed_overrides(printed: str) -> dict[str, Any]:
    """The values of `--config.KEY=VALUE` in what a program printed last."""
    words = [word for word in shlex.split(printed.splitlines()[-1]) if "=" in word]
    pairs = [word.removeprefix("--config.").split("=", 1) for word in words]
    return {key: ast.literal_eval(value) for key, value in pairs}


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """JSON Lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_beir(folder: Path, pairs: Sequence[Mapping[str, str]], queries: int) -> Path:
    """A BEIR folder: each pair's document, and the first pairs' queries, which it answers."""
    (folder / "qrels").mkdir(parents=True)
    documents = [{"_id": f"d{i}", "text": row["document"]} for i, row in enumerate(pairs)]
    asked = [{"_id": f"q{i}", "text": row["query"]} for i, row in enumerate(pairs[:queries])]
    write_lines(folder / "corpus.jsonl", documents)
    write_lines(folder / "queries.jsonl", asked)
    judged = ["query-id\tcorpus-id\tscore", *(f"q{i}\td{i}\t1" for i in range(queries))]
    (folder / "qrels" / "test.tsv").write_text("\n".join(judged) + "\n", encoding="utf-8")
    return folder


def text_pairs(texts: Iterable[str], count: int) -> list[dict[str, str]]:
    """Pairs of a text's first words and the text."""
    chosen = [text for text in texts if len(text.split()) > 12][:count]
    return [{"query": " ".join(text.split()[:5]), "document": text} for text in chosen]


def read_strictly(path: Path) -> Any:
    """JSON as the standard has it, which knows no NaN and no infinity."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{path} holds {name}")

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
