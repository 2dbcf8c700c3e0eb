"""launch/prepare.py as a user runs it: what it prints, what it refuses, and where it goes on."""

import contextlib
import csv
import dataclasses
import gzip
import io
import json
import multiprocessing
import os
import re
import resource
import runpy
import shlex
import signal
import subprocess
import sys
import time
import unicodedata
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from absl import flags
from ml_collections import config_flags
from transformers import PreTrainedTokenizerFast

from colbert_jax.data import builders, corpora, docstrings, tables
from colbert_jax.data import text as text_module
from colbert_jax.data.corpora import CORPORA
from colbert_jax.data.hub import Hub
from colbert_jax.data.inputs import open_corpus, open_tokens
from colbert_jax.data.records import TextSource, TokenSource
from colbert_jax.huggingface import read_tokenizer

ROOT = Path(__file__).parents[1]
PROGRAM = ROOT / "launch" / "prepare.py"

# The real program in a process of its own; what it imports is imported once.
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(
    ["colbert_jax.prepare", "colbert_jax.cli", "colbert_jax.start", "pyarrow.parquet", "pytest"]
)


@dataclasses.dataclass
class Result:
    status: int
    out: str
    err: str
    peak_mb: float


def _hold_before(number, go):
    """Cuts small shards, and waits with one of them until a file is there."""
    text_module._FEWEST_ROWS, tables._MARK_ROWS = 20, 10
    write = builders.write_shard

    def held(job, shard, *rest):
        while shard.number == number and not go.exists():
            time.sleep(0.01)
        return write(job, shard, *rest)

    builders.write_shard = held


def _launch(arguments, cwd, hub=None, limit=None, hold=None):
    os.chdir(cwd)
    for number, name in ((1, "out"), (2, "err")):
        descriptor = os.open(f"{cwd}/.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, number)
    sys.stdout.reconfigure(encoding="utf-8", errors="strict")  # as on most screens
    sys.stderr.reconfigure(encoding="utf-8", errors="backslashreplace")
    if hub is not None:
        Hub.commit = lambda self, dataset, revision: "c0ffee" * 6 + "beef"
        Hub.files = lambda self, dataset, commit: [
            str(path.relative_to(hub)) for path in hub.rglob("*.parquet")
        ]
        Hub.fetch = lambda self, dataset, commit, file: hub / file
    if hold is not None:
        _hold_before(*hold)
    if limit is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    # What runs in the background of a shell has it ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = [str(PROGRAM), *arguments]
    try:
        runpy.run_path(str(PROGRAM), run_name="__main__")
    finally:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        Path(cwd, ".peak").write_text(str(peak))


def prepare(*arguments, cwd, hub=None, limit=None):
    """Runs the program to its end."""
    process = _FORKS.Process(target=_launch, args=(arguments, cwd, hub, limit))
    process.start()
    process.join(100)
    assert process.exitcode is not None, "it hangs"
    read = {}
    for name in ("out", "err", "peak"):
        path = Path(cwd, f".{name}")
        read[name] = path.read_bytes().decode(errors="surrogateescape")
        path.unlink()
    return Result(process.exitcode, read["out"], read["err"], float(read["peak"]))


def error_of(result):
    """The one line of a user's error, below what the program told before."""
    assert result.status == 2, result.err
    assert "Traceback" not in result.err
    lines = result.err.replace("\r", "\n").splitlines()
    found = [line for line in lines if line.startswith("error: ")]
    assert len(found) == 1 and lines[-1] == found[0], result.err
    return found[0]


def _write(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(records), path)
        return path
    data = b"".join(
        (r if isinstance(r, bytes) else json.dumps(r).encode()) + b"\n" for r in records
    )
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def _pairs(count, name="a"):
    return [{"query": f"query {name} {i}", "document": f"document {i}"} for i in range(count)]


@pytest.fixture(scope="module")
def model(tokenizer_file, tmp_path_factory):
    """A folder with a model's tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    special = {f"{name}_token": f"[{name.upper()}]" for name in ("unk", "cls", "sep", "pad")}
    PreTrainedTokenizerFast(
        tokenizer_file=str(tokenizer_file), mask_token="[MASK]", **special
    ).save_pretrained(folder)
    return folder


def training_input(result):
    """`config.input` of the training run that the program's last line tells of."""
    line = result.out.splitlines()[-1]
    told = "Train on it with "
    assert line.startswith(told)
    values = flags.FlagValues()
    config = runpy.run_path(str(ROOT / "configs" / "pretrain.py"))["get_config"]()
    arguments = ["train.py", *shlex.split(line.removeprefix(told))]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "argv", arguments)  # where config_flags looks too
        config_flags.DEFINE_config_dict("config", config, flag_values=values)
        values(arguments)
    return values.config.input.to_dict()


def folder_of(result):
    """Where the program says that it wrote the source."""
    (found,) = set(re.findall(r"(?:written to|prepared before in) (.*): [\d.,]+ MB", result.out))
    return found


# --- the program itself ---


def test_the_program_prepares_text_and_tokens_and_says_how_to_train_on_them(tmp_path, model):
    rows = [*_pairs(40), *_pairs(2), {"query": " ", "document": "d"}, b"{"]
    _write(tmp_path / "pairs.jsonl.gz", rows)
    command = [sys.executable, str(PROGRAM), "--corpus=files", "--source=pairs.jsonl.gz"]
    command += ["--output=out", f"--tokenizer={model}", "--document_length=64"]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert ran.returncode == 0, ran.stderr
    lines = ran.stdout.splitlines()
    assert lines[0] == "files/pairs"
    assert lines[1] == "  40 of 44 rows kept, 1 document each"
    assert "  1 dropped as undecodable; the first: pairs.jsonl.gz, row 44: " in ran.stdout
    assert "  1 dropped as empty; the first: pairs.jsonl.gz, row 43: " in ran.stdout
    assert "  2 dropped as duplicate; the first: pairs.jsonl.gz, row 41: " in ran.stdout
    assert re.search(r"written to out/files/pairs-\w{8}/1\.0\.0: 0\.1 MB in 1 shard, ", ran.stdout)
    assert f"tokens of {model} (at most 39 a query, 64 a document; hash " in ran.stdout
    assert re.search(r"files/pairs-\w+: .*100%.*40\.0/40\.0|44\.0/44\.0", ran.stderr)
    assert "100%" not in ran.stdout and "Traceback" not in ran.stderr
    result = Result(ran.returncode, ran.stdout, ran.stderr, 0)
    settings = training_input(result)
    assert settings["files"] == ("pairs.jsonl.gz",) and settings["tokenized"] is True
    assert settings["cache_dir"] == "out"


def test_list_names_every_source_with_its_rows_and_licence(tmp_path):
    ran = subprocess.run(
        [sys.executable, str(PROGRAM), "--list"], capture_output=True, text=True, timeout=100
    )
    assert ran.returncode == 0 and ran.stderr == ""
    lines = [line.strip() for line in ran.stdout.splitlines()]
    listed = 0
    for name, corpus in CORPORA.items():
        assert any(line.startswith(f"{name}: {corpus.dataset}") for line in lines)
        for source in corpus.sources:
            wanted = re.compile(
                rf"{re.escape(source.name)} +{source.rows:,} +{re.escape(source.licence)}"
            )
            assert any(map(wanted.fullmatch, lines)), source.name
            listed += 1
    assert listed == 29 + 10 + 1
    assert re.search(r"squad +25,117 +CC BY-SA 4\.0", ran.stdout)
    assert re.search(r"nli_simcse_50negs_fixed +275,595 +CC BY-SA 4\.0", ran.stdout)
    assert re.search(r"train +640,000 +non-commercial research", ran.stdout)
    assert "docstrings" in ran.stdout and "OWNER/NAME" in ran.stdout


def test_a_second_run_takes_what_the_first_made(tmp_path, model):
    _write(tmp_path / "pairs.jsonl", _pairs(30))
    arguments = ("--corpus=files", "--source=pairs.jsonl", "--output=out", f"--tokenizer={model}")
    first = prepare(*arguments, cwd=tmp_path)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    second = prepare(*arguments, cwd=tmp_path)
    assert first.status == second.status == 0
    assert first.out.count("written to") == 2 and second.out.count("was prepared before in") == 2
    assert second.err == ""
    assert first.out.splitlines()[-1] == second.out.splitlines()[-1]
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}


def test_other_options_for_a_prepared_source_are_refused(tmp_path, model):
    _write(tmp_path / "pairs.jsonl", _pairs(30))
    given = ("--corpus=files", "--source=pairs.jsonl", "--output=out", f"--tokenizer={model}")
    assert prepare(*given, "--min_characters=4", cwd=tmp_path).status == 0
    line = error_of(prepare(*given, "--min_characters=5", cwd=tmp_path))
    assert "'min_characters': 4" in line and "'min_characters': 5" in line
    line = error_of(prepare(*given, "--query_length=40", cwd=tmp_path))
    assert "query_length=39" in line and "not 40" in line
    for asked in ((), ("--query_length=20",)):  # what is there holds it
        assert prepare(*given, *asked, cwd=tmp_path).status == 0


# --- what it refuses ---


def _bad_files(folder):
    _write(folder / "pairs.jsonl", _pairs(3))
    _write(folder / "other.jsonl", [b"{", {"title": "t", "text": "x"}, *_pairs(2)])
    _write(folder / "useless.jsonl", [{"query": " ", "document": "d"}, b"{", [1]])
    _write(folder / "empty.jsonl", [])
    _write(folder / "notes.txt", [b"text"])
    whole = _write(folder / "cut.jsonl.gz", [{"query": os.urandom(999).hex()}] * 9).read_bytes()
    (folder / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    (folder / "wrong.jsonl.gz").write_bytes(b"no gzip at all")
    whole = _write(folder / "cut.parquet", _pairs(300)).read_bytes()
    (folder / "cut.parquet").write_bytes(whole[: len(whole) // 2])
    _write(folder / "ids.parquet", [{"id": 1}])


@pytest.fixture(scope="module")
def bad_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    _bad_files(folder)
    return folder


FILES = ("--corpus=files", "--output=out")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((), r"--corpus is missing"),
        (("--corpus=files", "--source=pairs.jsonl"), r"--output is missing"),
        (("--corpus=files", "--output=out"), r"--source is missing"),
        (("--corpus=nomic", "--output=out"), r"no corpus nomic: choose one of nomic_unsupervis"),
        (
            ("--corpus=nomic_unsupervised", "--source=squad,sqad", "--output=out"),
            r"no source sqad: choose one of reddit_title_body, .*squad",
        ),
        (
            ("--corpus=nomic_supervised", "--columns=query=q", "--output=out"),
            r"columns of nomic_supervised are known",
        ),
        (("--corpus=a/b", "--output=out"), r"splits of a/b is meant"),
        (
            ("--corpus=docstrings", "--columns=query=q", "--output=out"),
            r"columns of docstrings are known",
        ),
        ((*FILES, "--source=pairs.jsonl", "--columns=query"), r"'query' is not of the form"),
        ((*FILES, "--source=pairs.jsonl", "--columns=query="), r"'query=' is not of the form"),
        ((*FILES, "--source=pairs.jsonl", "--columns==q"), r"'=q' is not of the form"),
        (
            (*FILES, "--source=pairs.jsonl", "--columns=question=query"),
            r"'question' is none of our columns, which are query, ",
        ),
        (
            (*FILES, "--source=pairs.jsonl", "--columns=query=question"),
            r"pairs\.jsonl, row 1: there is no column question to read query from",
        ),
        ((*FILES, "--source=other.jsonl"), r"other\.jsonl, row 2: the columns found are title, te"),
        ((*FILES, "--source=ids.parquet"), r"ids\.parquet: the columns found are id"),
        ((*FILES, "--source=none.jsonl"), r"none\.jsonl cannot be read .*check the path"),
        ((*FILES, "--source=none-*.jsonl"), r"none-\*\.jsonl matches no file"),
        ((*FILES, "--source=notes.txt"), r"notes\.txt is not a kind of file that can be read"),
        ((*FILES, "--source=."), r"cannot be read|not a kind of file"),
        ((*FILES, "--source=empty.jsonl"), r"empty\.jsonl has no rows|none of 0 rows"),
        ((*FILES, "--source=cut.jsonl.gz"), r"cut\.jsonl\.gz is a truncated or damaged gzip"),
        ((*FILES, "--source=wrong.jsonl.gz"), r"wrong\.jsonl\.gz is a truncated or damaged gzip"),
        ((*FILES, "--source=cut.parquet"), r"cut\.parquet is not a sound Parquet file"),
        (
            (*FILES, "--source=useless.jsonl"),
            r"none of 3 rows.*useless\.jsonl, row 1: .*useless\.jsonl, row 2: .*",
        ),
        (
            ("--corpus=files", "--source=pairs.jsonl", "--output=pairs.jsonl"),
            r"cannot be written \(Not a directory\)",
        ),
        ((*FILES, "--source=pairs.jsonl", "--tokenizer=nowhere/model"), r"neither a folder nor"),
        ((*FILES, "--source=pairs.jsonl", "--tokenizer=."), r"has no tokenizer\.json"),
        (
            (*FILES, "--source=pairs.jsonl", "--beam_runner=x", "--consistency_model=y"),
            r"prepare without --beam_runner",
        ),
        ((*FILES, "--source=pairs.jsonl", "--beam_runner=NoSuch"), r"Beam's NoSuch failed"),
        ((*FILES, "--source=pairs.jsonl", "--min_characters=0"), r"min_characters"),
        ((*FILES, "--source=pairs.jsonl", "--nosuchflag=1"), r"nosuchflag"),
        ((*FILES, "pairs.jsonl"), r"'pairs\.jsonl' is not a flag"),
    ],
)
def test_what_cannot_be_used_is_named_in_one_line(bad_files, arguments, message):
    line = error_of(prepare(*arguments, cwd=bad_files))
    assert re.search(message, line), line
    assert not list(bad_files.rglob("manifest.json"))


def test_a_package_without_docstrings_is_named(tmp_path):
    given = ("--corpus=docstrings", "--source=nothing_such", "--output=out")
    assert "nothing_such" in error_of(prepare(*given, cwd=tmp_path))


# --- other corpora ---


def test_sources_of_a_corpus_are_prepared_one_after_another(tmp_path):
    for name, count in (("squad", 12), ("npr", 7)):
        _write(tmp_path / "hub" / f"{name}-00000-of-00001.parquet", _pairs(count, name))
    given = ("--corpus=nomic_unsupervised", "--source=npr,squad", "--output=the output")
    result = prepare(*given, cwd=tmp_path, hub=tmp_path / "hub")
    assert result.status == 0, result.err
    assert f"nomic_unsupervised/npr, revision {'c0ffee' * 6}beef" in result.out
    assert result.out.index("  7 of 7 rows") < result.out.index("nomic_unsupervised/squad")
    settings = training_input(result)
    assert settings["corpus"] == "nomic_unsupervised" and settings["sources"] == ("npr", "squad")
    assert settings["cache_dir"] == "the output"
    corpus = open_corpus(settings | {"cache_dir": tmp_path / "the output", "revision": ""})
    assert {name: len(source) for name, source in corpus.sources.items()} == {"npr": 7, "squad": 12}


def test_docstrings_of_a_package_are_prepared(tmp_path):
    given = ("--corpus=docstrings", "--source=filelock", "--output=out")
    result = prepare(*given, cwd=tmp_path)
    assert result.status == 0, result.err
    assert result.out.startswith("docstrings/filelock\n") and "rows kept" in result.out
    settings = training_input(result)
    assert settings["corpus"] == "docstrings" and settings["sources"] == ("filelock",)
    pairs, _ = docstrings.split(docstrings.collect(("filelock",), processes=1))
    source = TextSource(tmp_path / folder_of(result))
    assert [row["query"] for row in source] == [pair.query for pair in pairs]


def test_files_of_one_name_are_both_prepared(tmp_path):
    _write(tmp_path / "a" / "pairs.jsonl", _pairs(3))
    _write(tmp_path / "b" / "pairs.jsonl", _pairs(5))
    given = ("--corpus=files", "--source=a/pairs.jsonl,b/pairs.jsonl", "--output=out")
    result = prepare(*given, cwd=tmp_path)
    assert result.status == 0
    assert "3 of 3 rows kept" in result.out and "5 of 5 rows kept" in result.out
    assert len(list((tmp_path / "out").rglob("manifest.json"))) == 2


# --- what it says of training ---


def _open_as_told(result, cwd, monkeypatch):
    """The corpus that training would open, which must need nothing prepared."""
    monkeypatch.chdir(cwd)

    def again(self):
        raise AssertionError(f"{self.folder} is prepared again")

    monkeypatch.setattr(corpora.TextBuilder, "open_job", again)
    return open_corpus(training_input(result) | {"revision": ""})


@pytest.mark.parametrize(
    "name",
    ["pairs.jsonl", "two words.jsonl", "it's.jsonl", 'a"b$(touch made)`x`.jsonl', "a,b;c&d.jsonl"],
)
def test_training_as_told_reads_what_was_prepared(tmp_path, monkeypatch, name):
    _write(tmp_path / name, _pairs(9))
    _write(tmp_path / "second.jsonl", _pairs(4))
    text = io.StringIO()
    csv.writer(text, lineterminator="").writerow([name, "second.jsonl"])
    given = ("--corpus=files", f"--source={text.getvalue()}", "--output=out $dir")
    result = prepare(*given, cwd=tmp_path)
    assert result.status == 0, result.err
    assert training_input(result)["files"] == (name, "second.jsonl")
    corpus = _open_as_told(result, tmp_path, monkeypatch)
    assert [len(source) for source in corpus.sources.values()] == [9, 4]


def test_training_as_told_reads_what_was_prepared_with_columns(tmp_path, monkeypatch):
    _write(tmp_path / "rows.jsonl", [{"q": f"query {i}", "d": f"text {i}"} for i in range(9)])
    given = ("--corpus=files", "--source=rows.jsonl", "--columns=query=q,document=d")
    result = prepare(*given, "--output=out", cwd=tmp_path)
    assert result.status == 0, result.err
    corpus = _open_as_told(result, tmp_path, monkeypatch)
    assert [len(source) for source in corpus.sources.values()] == [9]


def test_the_prompts_and_lengths_of_the_flags_are_those_of_the_tokens(tmp_path, model, monkeypatch):
    _write(tmp_path / "pairs.jsonl", _pairs(9))
    given = ("--corpus=files", "--source=pairs.jsonl", "--output=out", f"--tokenizer={model}")
    chosen = ("--query_prompt=frage: ", "--document_prompt=", "--query_length=10")
    result = prepare(*given, *chosen, cwd=tmp_path)
    assert result.status == 0, result.err
    corpus = _open_as_told(result, tmp_path, monkeypatch)
    overrides = {"query_prompt": "frage: ", "query_length": 10, "document_length": 519}
    tokenizer = read_tokenizer(str(model), None, overrides)
    (source,) = open_tokens(corpus, tokenizer).sources.values()
    assert isinstance(source, TokenSource)
    assert source.manifest["tokenizer"]["document_prompt"] == ""
    (text,) = corpus.sources.values()
    assert source[3]["query"].tolist() == tokenizer.query_ids([text[3]["query"]])[0]


@pytest.mark.parametrize(
    "corpus, length",
    [("nomic_unsupervised", 187), ("nomic-ai/nomic-embed-unsupervised-data", 187), ("o/n", 519)],
)
def test_documents_are_stored_at_the_length_of_the_recipe(tmp_path, model, corpus, length):
    _write(tmp_path / "hub" / "squad-00000-of-00001.parquet", _pairs(5))
    given = (f"--corpus={corpus}", "--source=squad", "--output=out", f"--tokenizer={model}")
    result = prepare(*given, cwd=tmp_path, hub=tmp_path / "hub")
    assert result.status == 0, result.err
    assert f"(at most 39 a query, {length} a document; hash " in result.out


# --- hostile rows ---


def _snapshot(folder, without):
    return {
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if without not in path.relative_to(folder).parts
    }


def _check_no_control_characters(result):
    text = (result.out + result.err).replace("\n", "").replace("\r", "")
    assert not [c for c in text if unicodedata.category(c) == "Cc"]


HOSTILE = [
    "../../x",
    "/etc/passwd",
    "{0.__class__}",
    "%s%n%99999d",
    "$(touch made)",
    "`touch made`",
    "'); DROP TABLE x; --",
    "\x1b[2J\x1b]0;title\x07 \x00 \x7f \x9b31m",
    "__import__('os').system('touch made')",
    "\u202e\u2066 reversed",
]


def test_what_rows_say_stays_data(tmp_path):
    records = [{"query": f"{text} query", "document": text * 2} for text in HOSTILE]
    wrong = [{"query": text, "documents": [text], "scores": [text]} for text in HOSTILE]
    short = [{"query": text[:1], "document": text} for text in HOSTILE]
    broken = [text.encode("utf-8")[:9] for text in HOSTILE]
    _write(tmp_path / "rows.jsonl", [*records, *wrong, *short, *broken])
    before = _snapshot(tmp_path, "out")
    result = prepare("--corpus=files", "--source=rows.jsonl", "--output=out", cwd=tmp_path)
    assert result.status == 0, result.err
    _check_no_control_characters(result)
    assert _snapshot(tmp_path, "out") == before
    source = TextSource(tmp_path / folder_of(result))
    assert [(row["query"], *row["documents"]) for row in source] == [
        (record["query"], record["document"]) for record in records
    ]


def test_the_columns_of_a_file_are_shown_without_control_characters(tmp_path):
    _write(tmp_path / "columns.jsonl", [{text: 1 for text in HOSTILE}])
    result = prepare("--corpus=files", "--source=columns.jsonl", "--output=out", cwd=tmp_path)
    assert "row 1: the columns found are ../../x, " in error_of(result)
    _check_no_control_characters(result)


@pytest.mark.parametrize("text", [HOSTILE[0], HOSTILE[2], HOSTILE[7]])
def test_ids_of_tables_are_shown_without_control_characters(tmp_path, text):
    hub = tmp_path / "hub"
    row = {"query_id": "1", "document_ids": ["1"], "scores": [1.0]}
    _write(hub / "train.parquet", [row, row | {"query_id": text}, row | {"document_ids": [text]}])
    _write(hub / "queries.parquet", [{"query_id": "1", "text": "a query"}])
    _write(hub / "documents.parquet", [{"document_id": "1", "text": "a document"}])
    given = ("--corpus=ms_marco_distillation", "--min_documents=1", "--output=out")
    before = _snapshot(tmp_path, "out")
    result = prepare(*given, cwd=tmp_path, hub=hub)
    assert result.status == 0, result.err
    assert "2 dropped as no text" in result.out
    _check_no_control_characters(result)
    assert _snapshot(tmp_path, "out") == before


@pytest.mark.parametrize("name", ["\udcff\udcfe.jsonl", "a\x1b[2Jb.jsonl"])
def test_names_of_files_that_no_screen_shows_do_no_harm(tmp_path, name):
    _write(tmp_path / "in" / name, [*_pairs(4), {"query": " ", "document": "d"}])
    result = prepare("--corpus=files", "--source=in/*.jsonl", "--output=out", cwd=tmp_path)
    assert result.status == 0 and "Traceback" not in result.err, result.err
    assert "4 of 5 rows kept" in result.out
    _check_no_control_characters(result)


# --- two at once, a full disk, and memory ---


@contextlib.contextmanager
def _held(arguments, folder, output, number):
    """The program, in a folder of its own, that waits before a shard."""
    folder.mkdir()
    hold = (number, folder / "go")
    process = _FORKS.Process(target=_launch, args=(arguments, folder, None, None, hold))
    process.start()
    try:
        for _ in range(6000):
            if len(list(output.glob("files/*/.*.unfinished/shard-*.json"))) == number:
                break
            time.sleep(0.01)
        yield process
        (folder / "go").touch()
        process.join(100)
    finally:
        process.kill()
        process.join()


def test_a_second_program_is_refused_while_the_first_prepares(tmp_path):
    _write(tmp_path / "pairs.jsonl", _pairs(95))
    given = ("--corpus=files", f"--source={tmp_path}/pairs.jsonl", f"--output={tmp_path}/out")
    with _held(given, tmp_path / "first", tmp_path / "out", 2) as first:
        line = error_of(prepare(*given, cwd=tmp_path))
    assert "Another preparation of" in line and "is under way: wait for it" in line
    assert first.exitcode == 0
    assert "95 of 95 rows kept" in (tmp_path / "first" / ".out").read_text()
    result = prepare(*given, cwd=tmp_path)
    assert "was prepared before in" in result.out
    rows = list(TextSource(folder_of(result)))
    assert [row["query"] for row in rows] == [f"query a {i}" for i in range(95)]


def test_the_same_command_goes_on_where_one_was_stopped(tmp_path):
    _write(tmp_path / "pairs.jsonl", _pairs(95))
    given = ("--corpus=files", f"--source={tmp_path}/pairs.jsonl", f"--output={tmp_path}/out")
    for count, number, status in ((1, signal.SIGINT, 130), (3, signal.SIGKILL, -signal.SIGKILL)):
        with _held(given, tmp_path / f"stopped-{count}", tmp_path / "out", count) as stopped:
            os.kill(stopped.pid, number)
            stopped.join(100)
        assert stopped.exitcode == status
    said = (tmp_path / "stopped-1" / ".err").read_text()
    assert said.endswith("Stopped.\n") and "Traceback" not in said
    shards = list((tmp_path / "out").glob("files/*/.*.unfinished/shard-*.array_record"))
    written = {(shard.stat().st_ino, shard.stat().st_mtime_ns) for shard in shards}
    assert len(written) == 3
    result = prepare(*given, cwd=tmp_path)
    assert result.status == 0, result.err
    assert "going on: 3 of 5 shards are written" in result.err
    assert "95 of 95 rows kept" in result.out
    source = TextSource(folder_of(result))
    files = [source.folder / shard["name"] for shard in source.manifest["shards"]]
    assert written <= {(file.stat().st_ino, file.stat().st_mtime_ns) for file in files}
    assert [row["query"] for row in source] == [f"query a {i}" for i in range(95)]


def test_a_full_disk_is_told_in_one_line_and_the_same_command_goes_on(tmp_path, model):
    _write(
        tmp_path / "pairs.jsonl",
        [{"query": f"query {i}", "document": os.urandom(40).hex()} for i in range(4000)],
    )
    given = ("--corpus=files", "--source=pairs.jsonl", "--output=out", f"--tokenizer={model}")
    for limit in (10_000, 100_000):
        line = error_of(prepare(*given, cwd=tmp_path, limit=limit))
        assert "cannot be written (" in line and "make room there" in line
        assert not list((tmp_path / "out").rglob("manifest.json"))
    result = prepare(*given, cwd=tmp_path)
    assert result.status == 0 and "4,000 of 4,000 rows kept" in result.out
    assert len(TextSource(tmp_path / folder_of_text(result))) == 4000


def folder_of_text(result):
    return re.findall(r"written to (.*): [\d.,]+ MB", result.out)[0]


def _long_rows(path, count):
    words = [f"{i:x}" * 4 for i in range(997)]

    def records(start, stop):
        for i in range(start, stop):
            text = " ".join(words[(i * j) % 997] for j in range(1, 260))
            yield {"query": f"query {i}", "document": f"{i} {text}"[:4000]}

    if path.suffix == ".parquet":
        with pq.ParquetWriter(
            path, pa.schema({"query": pa.string(), "document": pa.string()})
        ) as w:
            for start in range(0, count, 3000):
                w.write_table(pa.Table.from_pylist(list(records(start, start + 3000))))
        return
    with gzip.open(path, "wt", compresslevel=1) as file:
        for record in records(0, count):
            file.write(json.dumps(record) + "\n")


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".parquet"])
def test_memory_does_not_grow_with_the_corpus(tmp_path, suffix):
    peaks = []
    for count in (6000, 30_000):
        name = f"rows{count}{suffix}"
        _long_rows(tmp_path / name, count)
        given = ("--corpus=files", f"--source={name}", "--output=out")
        result = prepare(*given, cwd=tmp_path)
        assert result.status == 0, result.err
        assert f"{count:,} of {count:,} rows kept" in result.out
        peaks.append(result.peak_mb)
    assert max(peaks) < 1000
    assert peaks[1] - peaks[0] < 40, peaks  # the text is 70 MB longer


def test_beam_is_chosen_by_a_flag(tmp_path):
    pytest.importorskip("apache_beam")
    _write(tmp_path / "pairs.jsonl", _pairs(30))
    given = ("--corpus=files", "--source=pairs.jsonl")
    here = prepare(*given, "--output=here", cwd=tmp_path)
    chosen = ("--beam_runner=DirectRunner", "--beam_options=--direct_num_workers=1")
    beam = prepare(*given, "--output=beam", *chosen, cwd=tmp_path)
    assert here.status == beam.status == 0, beam.err
    digests: list[Any] = [
        [shard["rows_sha256"] for shard in TextSource(tmp_path / folder_of(r)).manifest["shards"]]
        for r in (here, beam)
    ]
    assert digests[0] == digests[1]
