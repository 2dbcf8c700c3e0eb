"""A run's results, system by system: the file that keeps them and the table that shows them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

Results = dict[str, dict[str, float]]  # system -> measure -> value


def read_results(workdir: Path) -> Results:
    """What `<workdir>/results.json` holds so far; one that cannot be read counts as nothing."""
    try:
        return json.loads((workdir / "results.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def write_json(path: Path, value: Any) -> None:
    """Writes JSON on the first host; a kill while writing leaves what was there before."""
    if jax.process_index() == 0:
        partial = path.with_name(f"{path.name}.partial")
        partial.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
        partial.replace(path)


def results_table(results: Mapping[str, Mapping[str, float]], markdown: bool = False) -> str:
    """Systems down, measures across, three decimals; as plain text or Markdown."""
    measures = list(next(iter(results.values())))
    rows = [["", *measures]]
    rows += [[name, *(f"{values[m]:.3f}" for m in measures)] for name, values in results.items()]
    if markdown:
        rows.insert(1, ["---"] + ["---:"] * len(measures))
        return "\n".join("| " + " | ".join(row) + " |" for row in rows)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            [
                row[0].ljust(widths[0]),
                *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)),
            ]
        )
        for row in rows
    ]
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join(lines)
