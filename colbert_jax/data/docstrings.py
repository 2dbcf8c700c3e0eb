"""A retrieval corpus that needs no download: docstrings of the installed Python packages.

A pair is one definition (class, function or method). Its query is the docstring's summary; its
document is the definition's name, its signature and what else the docstring says, or its code
where the docstring says nothing more. The summary is never in the document.

Only the standard library is imported here: the worker processes import this file, and must start
quickly and stay clear of JAX.
"""

import ast
import gzip
import hashlib
import json
import logging
import multiprocessing
import os
import re
import sys
import sysconfig
import tempfile
import textwrap
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path

from colbert_jax.errors import UserError

_log = logging.getLogger(__name__)

# Raise it whenever the pairs made from the same files change: it makes old caches stale.
EXTRACTION_VERSION = 1

# Top-level packages that installing colbert_jax brings with it, those with a hundred pairs or more.
# jaxlib and pygments are left out: generated bindings and tables of keywords, slow to parse.
DEFAULT_PACKAGES = (
    "absl",
    "anyio",
    "click",
    "etils",
    "filelock",
    "flax",
    "fontTools",
    "fsspec",
    "grain",
    "huggingface_hub",
    "jax",
    "matplotlib",
    "ml_collections",
    "mpl_toolkits",
    "numpy",
    "optax",
    "orbax",
    "packaging",
    "PIL",
    "psutil",
    "pyarrow",
    "pydantic",
    "pyparsing",
    "requests",
    "rich",
    "scipy",
    "simple_parsing",
    "tensorboardX",
    "tensorflow_datasets",
    "tqdm",
    "transformers",
    "treescope",
    "typer",
    "urllib3",
)

# Tests have few docstrings worth a search; the other folders hold copies of other packages.
_SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "testdata"}
    | {"_vendor", "vendor", "_vendored", "vendored", "third_party", "extern", "externals"}
)

MIN_QUERY_WORDS = 4
# Longer first sentences are mostly argument lists or tables that were laid out as prose.
MAX_QUERY_WORDS = 64
# A late-interaction model reads some 300-512 tokens of a document, 3-4 characters each. Text that
# no model reads would only slow BM25 and tokenization down, and give BM25 words the model lacks.
MAX_DOCUMENT_CHARACTERS = 2000

HELD_OUT_PERCENT = 10.0


@dataclass(frozen=True)
class Pair:
    """A query, the one document that answers it, and where both come from."""

    query: str
    """The docstring's first sentence, on one line."""
    document: str
    """Qualified name, signature, then the docstring's remainder or the code; several lines."""
    source: str
    """The top-level package, such as `jax`."""
    path: str
    """The file, relative to site-packages, with forward slashes."""
    name: str
    """The qualified name: module and class path, such as `optax._src.base.EmptyState`."""


Progress = Callable[[int, int], None]
"""Called with (files read, files in all)."""


def site_packages() -> tuple[Path, ...]:
    """The folders that this interpreter's packages are installed in, most specific first.

    A virtual environment may show the packages of the system's or the user's Python too; their
    folders are known from `sys.path`.
    """
    own = [sysconfig.get_paths()[key] for key in ("purelib", "platlib")]
    others = [entry for entry in sys.path if entry.endswith(("site-packages", "dist-packages"))]
    return tuple(Path(folder) for folder in dict.fromkeys(own + others))


def collect(
    packages: Sequence[str] = DEFAULT_PACKAGES,
    *,
    roots: Sequence[Path] | None = None,
    processes: int | None = None,
    progress: Progress | None = None,
) -> list[Pair]:
    """Makes the pairs of `packages`.

    Queries are unique by their case-folded text: the first in the order of `packages`, then of
    paths, then of lines is kept. That keeps copied code (its summaries are copied with it) from
    giving one query two answers, and from lying on both sides of the split. Files that are not
    valid UTF-8 or not valid Python are passed over; how many is logged.

    Args:
      packages: top-level packages; those that are not installed are passed over.
      roots: folders that hold packages; those of this interpreter when not given.
      processes: how many processes parse; one for each core, at most 8, when not given.
        1 parses in this process. More are spawned (never forked, which is unsafe once JAX runs
        threads), so a script must guard its entry point with `if __name__ == "__main__"`.
      progress: told after each file.

    Returns:
      The pairs, in an order that depends on nothing but the files.

    Raises:
      UserError: there is no pair at all.
    """
    roots = site_packages() if roots is None else roots
    return _collect(_find_files(packages, roots), packages, roots, processes, progress)


def split(
    pairs: Iterable[Pair], held_out_percent: float = HELD_OUT_PERCENT
) -> tuple[list[Pair], list[Pair]]:
    """Splits pairs into (train, held out), file by file.

    A file goes to one side as a whole, because definitions of one file describe each other. The
    side depends on nothing but the file's path, so it stays when packages are added or changed.

    Args:
      pairs: pairs from `collect`.
      held_out_percent: about how many files in a hundred are held out.
    """
    train: list[Pair] = []
    held_out: list[Pair] = []
    for pair in pairs:
        (held_out if _fraction(pair.path) * 100 < held_out_percent else train).append(pair)
    return train, held_out


def held_out_collection(
    pairs: Iterable[Pair], max_queries: int = 500
) -> tuple[dict[str, str], dict[str, str], dict[str, dict[str, int]]]:
    """Documents, queries and judgements to evaluate on.

    Every pair gives a document, `max_queries` of them a query. Each query has one relevant
    document, its own.

    Args:
      pairs: held-out pairs from `split`.
      max_queries: how many queries at most, those with the lowest SHA-256 of their text.

    Returns:
      `documents[document id]` and `queries[query id]`, both text, and
      `judgements[query id][document id]`, all 1. A document's id is its qualified name, with
      `#2` and so on behind it where a name is used again (a property's getter and setter, say).
      A query's id is `q:` and the id of its document; the two differ because some evaluation
      programs leave out results whose id is the query's.
    """
    named: dict[str, Pair] = {}
    for pair in pairs:
        document_id, copy = pair.name, 1
        while document_id in named:
            copy += 1
            document_id = f"{pair.name}#{copy}"
        named[document_id] = pair
    drawn = sorted(named, key=lambda document_id: _fraction(named[document_id].query))
    asked = sorted(drawn[:max_queries])
    return (
        {document_id: pair.document for document_id, pair in named.items()},
        {f"q:{document_id}": named[document_id].query for document_id in asked},
        {f"q:{document_id}": {document_id: 1} for document_id in asked},
    )


def load_or_collect(
    cache_dir: str | os.PathLike[str],
    packages: Sequence[str] = DEFAULT_PACKAGES,
    *,
    roots: Sequence[Path] | None = None,
    processes: int | None = None,
    progress: Progress | None = None,
) -> list[Pair]:
    """`collect`, remembered in a gzipped JSON Lines file of `cache_dir`.

    The file is used while the packages' files keep their names, sizes and times; otherwise a new
    one is made beside it. A damaged file is made anew. It is written under another name and then
    moved, so a program that is stopped or runs twice leaves no half file.

    Args:
      cache_dir: made if it is not there.
      packages: as in `collect`.
      roots: as in `collect`.
      processes: as in `collect`.
      progress: as in `collect`; not called when the file is used.

    Raises:
      UserError: there is no pair at all, or `cache_dir` cannot be written.
    """
    roots = site_packages() if roots is None else roots
    files = _find_files(packages, roots)
    fingerprint = _fingerprint(packages, files)
    path = Path(cache_dir) / f"docstrings-{fingerprint[:16]}.jsonl.gz"
    with _cache_errors(cache_dir):
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = _read_cache(path, fingerprint)
    if kept is not None:
        return kept
    pairs = _collect(files, packages, roots, processes, progress)
    with _cache_errors(cache_dir):
        _write_cache(path, fingerprint, pairs)
    return pairs


# --- files ---


@dataclass(frozen=True)
class _File:
    package: str
    root: Path
    path: str  # relative to root


def _find_files(packages: Sequence[str], roots: Sequence[Path]) -> list[_File]:
    files = []
    for package in dict.fromkeys(packages):
        root = next((root for root in roots if (root / package).is_dir()), None)
        if root is not None:
            paths = sorted(path.as_posix() for path in _python_files(root, package))
            files += [_File(package, root, path) for path in paths]
    return files


def _python_files(root: Path, package: str) -> Iterator[Path]:
    for folder, subfolders, names in os.walk(root / package):
        subfolders[:] = [name for name in subfolders if name not in _SKIPPED_FOLDERS]
        for name in names:
            path = Path(folder, name)
            # Transformers writes modeling_x.py out of modular_x.py: the same text twice.
            skipped = name.startswith(("test_", "modular_")) or name.endswith("_test.py")
            if name.endswith(".py") and not skipped and path.is_file():
                yield path.relative_to(root)


def _module(path: str) -> str:
    parts = path.removesuffix(".py").split("/")
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


# --- all files to pairs ---


def _collect(
    files: Sequence[_File],
    packages: Sequence[str],
    roots: Sequence[Path],
    processes: int | None,
    progress: Progress | None,
) -> list[Pair]:
    pairs: list[Pair] = []
    asked: set[str] = set()
    unreadable = 0
    for done, (file, found) in enumerate(zip(files, _parse_all(files, processes), strict=True), 1):
        unreadable += found is None
        for name, query, document in found or ():
            if query.casefold() not in asked:
                asked.add(query.casefold())
                pairs.append(Pair(query, document, file.package, file.path, name))
        if progress is not None:
            progress(done, len(files))
    _log.info("%d pairs from %d files, %d of them unreadable", len(pairs), len(files), unreadable)
    if not pairs:
        raise UserError(
            f"no docstrings were found for the packages {', '.join(packages)} in "
            f"{', '.join(map(str, roots))}; install this project with its dependencies, "
            "or name packages that are installed"
        )
    return pairs


_Found = list[tuple[str, str, str]]


def _parse_all(files: Sequence[_File], processes: int | None) -> Iterator[_Found | None]:
    if processes is None:
        processes = min(8, os.cpu_count() or 1)
    if processes == 1 or not files:
        yield from map(_parse_file, files)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        yield from pool.map(_parse_file, files, chunksize=16)


def _parse_file(file: _File) -> _Found | None:
    try:
        text = (file.root / file.path).read_bytes().decode("utf-8-sig")
        return extract(text, _module(file.path))
    except (OSError, SyntaxError, ValueError, RecursionError):
        return None


# --- one file to pairs ---

_Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef

# Where a summary's paragraph ends though no blank line follows it: a section's title or its
# underline, a field, a list, an example.
_PARAGRAPH_END = re.compile(
    r"\n\s*\n|\n(?=\s*(?:>>>|[:@]\w|\.\. |[-*] |\d+[.)] |[-=~^]{3,}|[A-Z]\w*(?: \w+)?:\s*(?:\n|$)))"
)
_SENTENCE_END = re.compile(
    r"""(?<=[.!?])(?<!\be\.g\.)(?<!\bi\.e\.)(?<!\bcf\.)(?<!\bvs\.)\s+(?=[A-Z0-9`*"'(\[:])"""
)
# What stands first in some docstrings without saying what the definition is for: a parameter
# (`x (int): ...`, `:param x: ...`), an example, a directive.
_NOT_A_SUMMARY = re.compile(
    r"(?:Args|Arguments|Parameters|Returns?|Raises|Yields|Examples?|Notes?) ?:|"
    r"[*`]*\w+[*`]* ?\([^:]*\) ?:|:\w+[ :]|>>>|\.\. |@\w|-{3}|={3}"
)


def extract(text: str, module: str) -> list[tuple[str, str, str]]:
    """(qualified name, query, document) of each documented definition, in the file's order.

    Args:
      text: a Python file.
      module: its dotted name.

    Raises:
      SyntaxError: it does not parse. ValueError and RecursionError can mean the same.
    """
    # The lines as the parser counts them: `str.splitlines` would break at form feeds too.
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    lines = text.split("\n")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # bad escapes in other people's strings
        definitions = list(_definitions(ast.parse(text), module))
    docstring_lines = {number for _, node in definitions for number in _docstring_lines(node)}
    found = []
    for name, node in definitions:
        query, remainder = _summary(ast.get_docstring(node) or "")
        if not query:
            continue
        if not remainder:
            remainder = _code(node, lines, docstring_lines)
        document = f"{name}\n{_signature(node, lines)}\n{remainder}"[:MAX_DOCUMENT_CHARACTERS]
        if _bare(query) not in _bare(document):
            found.append((name, query, document.rstrip()))
    return found


def _definitions(node: ast.AST, prefix: str) -> Iterator[tuple[str, _Definition]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, _Definition):
            name = f"{prefix}.{child.name}"
            yield name, child
            yield from _definitions(child, name)
        elif isinstance(child, ast.stmt | ast.ExceptHandler | ast.match_case):
            yield from _definitions(child, prefix)


def _summary(docstring: str) -> tuple[str, str]:
    """A docstring's first sentence, empty where it cannot be a query, and the remaining text."""
    paragraph, *others = _PARAGRAPH_END.split(docstring, maxsplit=1)
    sentence, *sentences = _SENTENCE_END.split(" ".join(paragraph.split()), maxsplit=1)
    words = sum(any(map(str.isalpha, word)) for word in sentence.split())
    if not MIN_QUERY_WORDS <= words <= MAX_QUERY_WORDS or _NOT_A_SUMMARY.match(sentence):
        return "", docstring
    return sentence, "\n".join([*sentences, *others]).strip()


def _bare(text: str) -> str:
    """Text as it is compared in search of a summary: letter case, spacing, full stop aside."""
    return " ".join(text.split()).casefold().rstrip(".")


def _signature(node: _Definition, lines: list[str]) -> str:
    """`def name(...) -> type` or `class Name(...)` on one line, without decorators."""
    # `ast.get_source_segment` would split the whole file into lines again for each definition.
    body = node.body[0]
    head = lines[node.lineno - 1 : body.lineno]
    # The parser counts columns in UTF-8 bytes.
    head[-1] = head[-1].encode()[: body.col_offset].decode()
    signature = " ".join(" ".join(head).split())
    if "#" in signature:  # most likely a comment, which would swallow the rest of the line
        signature = _unparsed_signature(node)
    return signature.replace("( ", "(").replace(", )", ")").replace(" )", ")").rstrip(": ")


def _unparsed_signature(node: _Definition) -> str:
    if isinstance(node, ast.ClassDef):
        bases = map(ast.unparse, [*node.bases, *node.keywords])
        return f"class {node.name}({', '.join(bases)})"
    kind = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"{kind} {node.name}({ast.unparse(node.args)}){returns}"


def _docstring_lines(node: _Definition) -> range:
    if ast.get_docstring(node, clean=False) is None:
        return range(0)
    return range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1)


def _code(node: _Definition, lines: list[str], docstring_lines: set[int]) -> str:
    """The code of a definition, without its docstring and those of the definitions in it.

    The latter are summaries too: they would make a class the answer to its methods' queries.
    """
    numbers = range(node.body[0].lineno, (node.end_lineno or 0) + 1)
    code = [lines[number - 1] for number in numbers if number not in docstring_lines]
    return textwrap.dedent("\n".join(code)).strip("\n")


# --- hashes and the cache ---


def _fraction(text: str) -> float:
    """A number in [0, 1) that depends on the text alone, as good as drawn at random."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48


def _fingerprint(packages: Sequence[str], files: Sequence[_File]) -> str:
    stats = [(file.root / file.path).stat() for file in files]
    known = [
        EXTRACTION_VERSION,
        sys.version_info[:2],  # which files parse
        list(packages),
        [
            (file.path, stat.st_size, stat.st_mtime_ns)
            for file, stat in zip(files, stats, strict=True)
        ],
    ]
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()


@contextmanager
def _cache_errors(cache_dir: str | os.PathLike[str]) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"the docstring corpus cannot be kept in {cache_dir} ({error.strerror}); "
            "name a folder that can be written"
        ) from error


def _read_cache(path: Path, fingerprint: str) -> list[Pair] | None:
    if not path.exists():
        return None
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            header = json.loads(file.readline())
            pairs = [Pair(*json.loads(line)) for line in file]
        if header != {"fingerprint": fingerprint, "pairs": len(pairs)}:
            raise ValueError("its first line does not fit the others")
    except (gzip.BadGzipFile, zlib.error, EOFError, ValueError, TypeError) as error:
        _log.warning("%s is damaged (%s) and is made anew", path, error)
        return None
    return pairs


def _write_cache(path: Path, fingerprint: str, pairs: Sequence[Pair]) -> None:
    rows: list[Mapping | tuple] = [{"fingerprint": fingerprint, "pairs": len(pairs)}]
    rows += [astuple(pair) for pair in pairs]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(gzip.compress(text.encode("utf-8"), mtime=0))
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
