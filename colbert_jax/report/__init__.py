"""A run's report: one HTML file that can be opened anywhere, made of the files in its folder.

`runs.py` reads and checks the files, `sections.py`, `curves.py` and `rankings.py` say what they
hold, and `markup.py` makes sure that nothing in them is taken for markup.
"""

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

from colbert_jax.errors import UserError
from colbert_jax.report import sections
from colbert_jax.report.markup import Html, document, foreign, tag
from colbert_jax.report.rankings import examples
from colbert_jax.report.runs import Run, read_runs

_HERE = Path(__file__).parent


def write_report(workdirs: Sequence[str | Path], output: str | Path | None = None) -> Path:
    """Writes the report of a run, or the comparison of several.

    Args:
      workdirs: the runs' folders.
      output: the file to write; by default `report.html` in the folder of the only run, or
        `comparison.html` here.

    Returns:
      The file.

    Raises:
      UserError: a folder that is no run's or is named twice, a file that cannot be read, or an
        output that cannot be written.
    """
    asked, known = read_runs(workdirs)
    if output is None:
        output = Path(workdirs[0]) / "report.html" if len(asked) == 1 else "comparison.html"
    output = Path(output)
    if not os.path.isdir(output.parent):  # which, unlike pathlib, answers for any name
        raise UserError(
            f"--output={output}: there is no folder {output.parent}; make it, or choose another "
            "--output."
        )
    if os.path.isdir(output):
        raise UserError(f"--output={output} is a folder: name a file in it.")
    _write(output, page(asked, known))
    return output


def page(asked: Sequence[Run], known: Sequence[Run]) -> Html:
    """The whole page.

    Args:
      asked: the runs that it is about.
      known: these and those that they started from, each after the one that it started from.
    """
    several = len(asked) > 1
    contents = [("what", "What was run"), ("results", "Results"), ("curves", "Curves")]
    if not several:
        contents.append(("queries", "Best and worst queries"))
    return document(
        " and ".join(run.name for run in asked) + (", compared" if several else ", report"),
        (_HERE / "page.css").read_text(encoding="utf-8"),
        (_HERE / "page.js").read_text(encoding="utf-8"),
        tag("a", "To the results", href="#results", class_="skip"),
        sections.opening(asked),
        tag(
            "nav",
            tag("ul", *(tag("li", tag("a", text, href=f"#{name}")) for name, text in contents)),
            aria_label="Contents",
        ),
        tag(
            "main",
            sections.what_was_run(asked, known),
            sections.results(asked, known),
            sections.curves(asked),
            examples(asked[0]) if not several else None,
        ),
        tag(
            "footer",
            tag("p", "Made of the files in ", *_listed(known), "."),
            tag("p", "Each run's own report has its best and worst queries.") if several else None,
        ),
    )


def _listed(runs: Sequence[Run]) -> list[Html | str]:
    parts: list[Html | str] = []
    for run in runs:
        parts += [", "] if parts else []
        parts.append(tag("code", foreign(str(run.workdir))))
    return parts


def _write(output: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    partial = output.with_name(f".{output.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8", newline="\n")
        partial.replace(output)
    except OSError as error:
        raise UserError(
            f"{output} cannot be written ({error.strerror}): choose another --output."
        ) from error
    finally:
        with contextlib.suppress(OSError):  # it is not there, or never could be
            partial.unlink()
