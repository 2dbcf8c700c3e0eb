"""What README.md and docs/ show: their text, their commands, and all that is meant to be run."""

import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))))

# A block, or a span within a line.
_SHOWN = re.compile(r"^```(\w*)\n(.*?)^```$|`([^`]+)`", re.M | re.S)
# How a span begins that is a command and no file's name.
_COMMAND = re.compile(r"(?:python|pip|hf) \S|(?:launch|benchmarks)/\w+\.\w+ \S")


class Command(NamedTuple):
    """A command that a page shows: the program, relative to the repository, and its arguments."""

    page: str
    program: str
    arguments: tuple[str, ...]


class Snippet(NamedTuple):
    """A piece of a page that is meant to be run: a block, a span, or what a program says is next.

    Attributes:
      page: the page.
      language: bash or python.
      text: as it stands there; the line breaks of a span are spaces.
    """

    page: str
    language: str
    text: str


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


@cache
def commands() -> tuple[Command, ...]:
    """Every command with one of our Python programs: in blocks, in the text, on lines alone."""
    return tuple(command for page in PAGES for command in _commands_of(page))


def _commands_of(page: str) -> Iterator[Command]:
    text = text_of(page)
    blocks = re.findall(r"^```\w*\n(.*?)^```$", text, re.M | re.S)
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    lines += [" ".join(span.split()) for span in re.findall(r"`(python [^`]+)`", prose)]
    lines += re.findall(r"^`(launch/[^`\n]+)`$", prose, re.M)
    for line in lines:
        for words in simple_commands(line, dict(re.findall(r"for (\w+) in (\S+)", text))):
            words = words[1:] if words[0] == "python" else words
            if words and re.fullmatch(r"(launch|benchmarks)/\w+\.py", words[0]):
                yield Command(page, words[0], tuple(words[1:]))


def simple_commands(line: str, variables: dict[str, str]) -> Iterator[list[str]]:
    """The words of each command of a line; loops' variables have their first value."""
    for name, value in variables.items():
        line = line.replace(f"${name}", value)
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    words: list[str] = []
    try:
        for token in [*lexer, ";"]:
            if set(token) <= set("();<>|&"):
                if words:
                    yield words
                words = []
            else:
                words.append(token)
    except ValueError:  # no line for a shell: it has one quotation mark
        return


@cache
def snippets() -> tuple[Snippet, ...]:
    """All that the pages show to be run, in the order in which it stands there."""
    return tuple(snippet for page in PAGES for snippet in _snippets_of(page))


def _snippets_of(page: str) -> Iterator[Snippet]:
    for language, block, span in _SHOWN.findall(text_of(page)):
        if language:
            yield Snippet(page, language, block)
        elif block:  # what a program prints
            for command in re.findall(r"^Next: (.+)$", block, re.M):
                yield Snippet(page, "bash", command)
        elif _COMMAND.match(text := " ".join(span.split())):
            yield Snippet(page, "bash", text)
