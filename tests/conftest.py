"""Set-up of all tests: eight virtual devices, the PyLate process, and real text to work on."""

import os
import sys
from pathlib import Path

# JAX reads these when it is first imported, which the tests do after this file.
_DEVICES = "--xla_force_host_platform_device_count"
if _DEVICES not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_DEVICES}=8".strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

# The test folders are no packages; this lets tests import from `reference`.
if (_HERE := str(Path(__file__).parent)) not in sys.path:
    sys.path.insert(0, _HERE)

import ast  # noqa: E402
import io  # noqa: E402
import random  # noqa: E402
import sysconfig  # noqa: E402
import threading  # noqa: E402
import tokenize  # noqa: E402
from collections.abc import Iterator  # noqa: E402

import pytest  # noqa: E402
from reference.client import PyLateReference  # noqa: E402
from reference.environment import pylate_python  # noqa: E402
from tokenizers import (  # noqa: E402
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

# Parts of the standard library that hold much prose and are in every Python.
_SOURCES = (
    "_collections_abc.py",
    "_pydecimal.py",
    "abc.py",
    "argparse.py",
    "ast.py",
    "calendar.py",
    "configparser.py",
    "csv.py",
    "difflib.py",
    "doctest.py",
    "email",
    "fractions.py",
    "http",
    "inspect.py",
    "json",
    "logging",
    "multiprocessing",
    "pathlib.py",
    "pickletools.py",
    "random.py",
    "statistics.py",
    "string.py",
    "tarfile.py",
    "textwrap.py",
    "threading.py",
    "tokenize.py",
    "typing.py",
    "unittest",
    "xml",
    "zipfile.py",
)

# What the texts of the library lack: other scripts, stray white space, next to nothing, tokens
# spelt out, and marks that a skip list names.
_EDGE_CASES = (
    "",
    " ",
    "\n\t ",
    ".",
    "?!",
    "...",
    "  two spaces before, and two after  ",
    "\ttabs\tand\nnew lines\r\n",
    "a        run of spaces",
    "\u00a0no-break spaces around\u00a0",
    "caf\u00e9 and cafe\u0301: composed and not",
    "Gr\u00f6\u00dfe, na\u00efvet\u00e9, \u0141\u00f3d\u017a",
    "\u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440!",
    "\u65e5\u672c\u8a9e\u306e\u6587\u7ae0\u3067\u3059\u3002",
    "\u0645\u0631\u062d\u0628\u0627 \u0628\u0627\u0644\u0639\u0627\u0644\u0645",
    "\U0001f600 emoji \U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1eb\U0001f1f7",
    "zero\u200bwidth and \ufeffbyte order marks",
    "the [MASK] token, [CLS] and [SEP] spelt out",
    "[Q] a marker in the text [D] and another",
    "(parentheses), [brackets], {braces}; 'quotes' & \"more\" - 100% #1 @home $5 ^2 ~3 `x` |y| \\z",
)


# Files that compile models, start programs or wait for them, the longest first: `slow` as a whole,
# and begun first, so that neither of two processes is left with one of them at the end.
SLOW = (
    *("test_documented_commands", "test_sharding", "test_study", "test_micro_batch"),
    *("test_kill", "test_interruption", "test_losses", "test_processes", "test_ahead"),
    *("test_benchmarks", "test_run", "test_checkpoint", "test_not_finite", "test_search"),
    *("test_cli", "test_prepare", "test_evals", "test_mine_program", "test_search_program"),
    *("test_colbert", "test_builders", "test_launch_scripts", "test_train", "test_score_program"),
    *("test_attention", "test_pipeline", "test_search_tpu", "test_profile_step"),
    *("test_hub_model", "test_huggingface", "test_maxsim", "test_maxsim_tpu", "test_maxsim_gpu"),
    *("test_modernbert", "test_cost", "test_evaluate_pylate", "test_consistency"),
    *("test_evaluate_program", "test_report_browser", "test_docs", "test_habits", "test_gke"),
    *("test_encode", "test_maxsim_mesh", "test_report", "test_corpora", "test_retriever"),
    *("test_index", "test_pairs", "test_lookup", "test_examples", "test_forms"),
)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    # To import files of which nothing is run takes a quarter of the quick tests' time.
    unwanted = "not slow" in config.option.markexpr and collection_path.stem in SLOW
    return True if unwanted else None


@pytest.hookimpl(trylast=True)  # coverage has begun by then
def pytest_sessionstart() -> None:
    """Has coverage leave threads alone that begin later, where that can end them.

    Before Python 3.12 one of two threads that are to be traced at the same moment ends before it
    runs (python/cpython 98257), and a test that waits for its work never ends.
    """
    if sys.version_info < (3, 12):
        threading.settrace(None)  # type: ignore[arg-type]


@pytest.hookimpl(tryfirst=True)  # before -m is looked at
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.stem in SLOW:
            item.add_marker("slow")
    items.sort(key=lambda item: SLOW.index(item.path.stem) if item.path.stem in SLOW else len(SLOW))


@pytest.fixture(scope="session")
def pylate(pytestconfig: pytest.Config) -> Iterator[PyLateReference]:
    """A PyLate process, started by the first test that asks for it."""
    capture = pytestconfig.pluginmanager.getplugin("capturemanager")

    def report(line: str) -> None:
        if capture is None:
            print(line, flush=True)
            return
        with capture.global_and_fixture_disabled():  # a minute's silence would look like a hang
            print(f"\n{line}", flush=True)

    with PyLateReference(pylate_python(report)) as reference:
        yield reference


@pytest.fixture(scope="session")
def real_texts() -> list[str]:
    """At least 1,200 different real texts of 1 to 1,000 words, and edge cases, well mixed."""
    rng = random.Random(0)
    names: list[str] = []
    prose: list[str] = []
    passages: list[str] = []
    for source in _library_sources():
        found, docstrings = _documented(source)
        names += found
        prose += docstrings + _comments(source)
        passages += _passages(source, rng)
    # Words as a search would have them, then prose of all lengths, then code.
    short = [text.splitlines()[0] for text in prose if len(text.split()) > 3]
    chosen = [
        text
        for pool, count in ((names, 150), (short, 350), (prose, 650), (passages, 150))
        for text in _sample(pool, count, rng)
    ]
    texts = list(dict.fromkeys([*_EDGE_CASES, *chosen]))
    rng.shuffle(texts)
    assert len(texts) >= 1200
    return texts


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer.json built like ModernBERT's but small, trained on the library's sources."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [
        *(AddedToken(f"[{name}]", special=True) for name in ("UNK", "CLS", "SEP", "PAD")),
        AddedToken("[MASK]", lstrip=True, special=True),
    ]
    trainer = trainers.BpeTrainer(
        vocab_size=3000,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_library_sources(), trainer)
    # ModernBERT's vocabulary has runs of spaces as added tokens that are not special.
    tokenizer.add_tokens([AddedToken(" " * count, normalized=True) for count in (8, 4, 2)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B [SEP]",
        special_tokens=[(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")],
    )
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def _library_sources() -> list[str]:
    """Return the text of each chosen file, in an order that does not change."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = [
        path
        for name in _SOURCES
        for path in (sorted((root / name).rglob("*.py")) if name[-3:] != ".py" else [root / name])
        if path.is_file()
    ]
    return [path.read_text(encoding="utf-8", errors="ignore") for path in paths]


def _documented(source: str) -> tuple[list[str], list[str]]:
    """Return the names of what a file documents, as words, and the docstrings."""
    names, docstrings = [], []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            continue
        text = ast.get_docstring(node)
        if text and text.strip():
            docstrings.append(text)
            if not isinstance(node, ast.Module):
                names.append(node.name.strip("_").replace("_", " ") or node.name)
    return names, docstrings


def _comments(source: str) -> list[str]:
    """Return a file's comments, the lines of one comment joined."""
    blocks: list[list[str]] = []
    last = -1
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        text = token.string.lstrip("#! ").rstrip()
        if token.type != tokenize.COMMENT or not text:
            continue
        if token.start[0] == last + 1:
            blocks[-1].append(text)
        else:
            blocks.append([text])
        last = token.start[0]
    return [" ".join(block) for block in blocks]


def _passages(source: str, rng: random.Random) -> list[str]:
    """Return stretches of code of up to 1,000 words, their line breaks and indents kept."""
    lines = source.splitlines()
    passages = []
    start = 0
    while start < len(lines):
        limit = rng.choice((50, 200, 400, 1000))
        end, words = start, 0
        while end < len(lines) and words + len(lines[end].split()) <= limit:
            words += len(lines[end].split())
            end += 1
        end = max(end, start + 1)
        passages.append("\n".join(lines[start:end]))
        start = end
    return [passage for passage in passages if passage.strip()]


def _sample(pool: list[str], count: int, rng: random.Random) -> list[str]:
    distinct = list(dict.fromkeys(pool))
    return rng.sample(distinct, min(count, len(distinct)))


@pytest.fixture(scope="module")
def quick_compilation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Compiles with little optimisation, and the program of each run that is alike once."""
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    jax.config.update("jax_disable_most_optimizations", True)
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("compiled")))
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_disable_most_optimizations", False)
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
