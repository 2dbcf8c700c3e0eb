"""Preparing: every row once, whole or not at all, and never twice the same work."""

import dataclasses
import errno
import gzip
import hashlib
import itertools
import json
import multiprocessing
import os
import resource
import signal
import sys
import threading
from collections import Counter

import filelock
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers
from transformers import PreTrainedTokenizerFast

from colbert_jax.data import builders, cleaning, corpora, rows, shards, tables
from colbert_jax.data import text as text_module
from colbert_jax.data import tokens as tokens_module
from colbert_jax.data.cleaning import Cleaning
from colbert_jax.data.corpora import file_builder
from colbert_jax.data.encode import make_encode
from colbert_jax.data.inputs import Corpus, open_corpus, open_tokens
from colbert_jax.data.records import Source, TextSource, TokenSource
from colbert_jax.data.text import RowFilter
from colbert_jax.data.tokens import TokenBuilder, token_features
from colbert_jax.errors import UserError
from colbert_jax.tokenization import ColbertTokenizer, TokenizationConfig, load_tokenizer

# Processes that are killed, limited or kept waiting; what they import is imported once.
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(
    ["colbert_jax.prepare", "colbert_jax.cli", "colbert_jax.start", "pyarrow.parquet", "pytest"]
)

CONFIG = {"files": (), "corpus": "", "sources": (), "revision": ""}


def _small_shards():
    """Shards of twenty rows and more, whatever the file."""
    text_module._FEWEST_ROWS, text_module._MOST_ROWS, tables._MARK_ROWS = 20, 100, 10
    text_module._BLOCK_ROWS = 7


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    for module, names in (
        (text_module, ("_FEWEST_ROWS", "_MOST_ROWS", "_BLOCK_ROWS")),
        (tables, ("_MARK_ROWS",)),
    ):
        for name in names:  # so that they are set back
            monkeypatch.setattr(module, name, getattr(module, name))
    _small_shards()


def _pairs(count, name="a"):
    return [
        {"query": f"query {name} {i} é", "document": f"document {name}\n{i} \u2028 {'x' * (i % 7)}"}
        for i in range(count)
    ]


def _scored(count, candidates=4):
    return [
        {
            "query": f"query {i}",
            "documents": [f"document {i} {j}" for j in range(candidates + i % 3)],
            "scores": [j / 3 - i for j in range(candidates + i % 3)],
        }
        for i in range(count)
    ]


def _write(path, records):
    """Records as a file; a text stands for a line as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(records), path, row_group_size=13)
        return path
    lines = [r if isinstance(r, bytes) else json.dumps(r).encode() for r in records]
    data = b"".join(line + b"\n" for line in lines)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def _expected(records):
    return [
        {"query": r["query"], "documents": [r["document"]], "scores": None}
        for r in records
        if isinstance(r, dict)
    ]


def _all(builder_or_folder):
    folder = getattr(builder_or_folder, "folder", builder_or_folder)
    source = TextSource(folder)
    return source.__getitems__(range(len(source)))


def _leftovers(folder):
    """What only an unfinished preparation has."""
    marks = ("partial", "incomplete", "unfinished", "sqlite", "digests")
    return [path for path in folder.rglob("*") if any(mark in path.name for mark in marks)]


def _run(target, *arguments):
    """The exit code of a function that has a process of its own; minus a signal's number."""
    process = _FORKS.Process(target=target, args=arguments)
    process.start()
    process.join(100)
    assert process.exitcode is not None, "it hangs"
    return process.exitcode


# --- shards ---


def test_rows_of_several_files_come_once_each_and_in_order(tmp_path):
    records = _pairs(230)
    blank = [b"", b"   "]
    first = [*records[:10], *blank * 6, *records[10:57], b"", *records[57:100], b""]
    _write(tmp_path / "part-0.jsonl", first)
    _write(tmp_path / "part-1.parquet", records[100:179])
    _write(tmp_path / "part-2.jsonl.gz", [b"", *records[179:], *blank])
    builder = file_builder(str(tmp_path / "part-*"), tmp_path / "out")
    manifest = builder.prepare()
    assert _all(builder) == _expected(records)
    assert manifest["read"] == manifest["kept"] == 230 and manifest["dropped"] == {}
    lengths = [shard["kept"] for shard in manifest["shards"]]
    assert sum(lengths) == 230 and len(lengths) >= 9 and min(lengths) > 0
    assert TextSource(builder.folder).shard_lengths == lengths


@pytest.mark.parametrize("seed", range(6))
def test_any_cut_of_any_rows_keeps_each_good_row_once(tmp_path, monkeypatch, seed):
    random = np.random.default_rng(seed)
    monkeypatch.setattr(tables, "_MARK_ROWS", int(random.integers(1, 12)))
    monkeypatch.setattr(text_module, "_FEWEST_ROWS", int(random.integers(1, 30)))
    monkeypatch.setattr(text_module, "_MOST_ROWS", int(random.integers(1, 40)))
    records, kinds = _pairs(150), random.choice(["good", "blank", "bad", "short"], 150)
    lines = {"blank": b" ", "bad": b"{", "short": b'{"query": "a", "document": "bc"}'}
    mixed = [
        record if kind == "good" else lines[str(kind)]
        for record, kind in zip(records, kinds, strict=True)
    ]
    suffix = (".jsonl", ".jsonl.gz")[seed % 2]
    path = _write(tmp_path / f"rows{suffix}", mixed)
    builder = file_builder(str(path), tmp_path / "out")
    manifest = builder.prepare()
    assert _all(builder) == _expected(mixed)
    counted = Counter(kinds.tolist())
    assert manifest["dropped"] == {"undecodable": counted["bad"], "too_short": counted["short"]}
    assert manifest["read"] == 150 - counted["blank"]
    for kind, reason in (("bad", "undecodable"), ("short", "too_short")):
        row = kinds.tolist().index(kind) + 1
        assert manifest["first_dropped"][reason].startswith(f"{path}, row {row}: ")


def test_a_source_is_cut_in_sixteen_within_bounds(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "_MARK_ROWS", 1)
    path = _write(tmp_path / "rows.jsonl", _pairs(160))
    for fewest, most, count in ((1, 100, 16), (40, 100, 4), (1, 4, 40)):
        monkeypatch.setattr(text_module, "_FEWEST_ROWS", fewest)
        monkeypatch.setattr(text_module, "_MOST_ROWS", most)
        builder = file_builder(str(path), tmp_path / f"out{count}")
        assert len(builder.prepare()["shards"]) == count


def test_the_digests_of_a_manifest_are_those_of_its_files_and_of_its_rows(tmp_path):
    path = _write(tmp_path / "rows.jsonl", _pairs(70))
    same = _write(tmp_path / "same.jsonl", [b"", *_pairs(70)])
    other = _write(tmp_path / "other.jsonl", [*_pairs(69), *_pairs(1, "other")])
    found = {}
    for file in (path, same, other):
        builder = file_builder(str(file), tmp_path / "out")
        found[file] = [shard["rows_sha256"] for shard in builder.prepare()["shards"]]
        for shard in json.loads((builder.folder / "manifest.json").read_text())["shards"]:
            data = (builder.folder / shard["name"]).read_bytes()
            assert shard["bytes"] == len(data)
            assert shard["sha256"] == hashlib.sha256(data).hexdigest()
    assert len(found[path]) == 4 and len(set(found[path])) == 4
    assert found[path][:3] == found[other][:3] and found[path][3] != found[other][3]
    assert found[path] != found[same]  # a line later, the same rows are cut elsewhere


@pytest.mark.parametrize("change", [{"query": "q!"}, {"documents": ["d!"]}, {"scores": [1.5]}])
def test_the_digest_of_rows_is_of_all_that_they_hold(tmp_path, change):
    row = {"query": "qq", "documents": ["dd"], "scores": [1.0]}
    digests = set()
    for i, records in enumerate(([row], [row], [row | change])):
        path = _write(tmp_path / f"{i}.jsonl", records)
        digests.add(file_builder(str(path), tmp_path).prepare()["shards"][0]["rows_sha256"])
    assert len(digests) == 2


def test_the_manifest_says_what_of_which_files(tmp_path):
    paths = [_write(tmp_path / f"part-{i}.jsonl", _pairs(5, str(i))) for i in range(2)]
    manifest = file_builder(str(tmp_path / "part-*.jsonl"), tmp_path / "out").prepare()
    assert manifest["origin"]["files"] == [
        {
            "name": path.name,
            "bytes": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in paths
    ]
    assert manifest["request"]["cleaning"] == dataclasses.asdict(Cleaning())
    assert manifest["request"]["filter"] is None


# --- what is dropped ---


def test_every_row_that_is_dropped_is_counted_with_its_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "MAX_ROW_BYTES", 500)

    def row(query, *documents):
        return {"query": query, "document": documents[0], "negative": list(documents[1:])}

    records = [
        *(row(f"query {i}", f"document {i}", "a negative") for i in range(30)),
        row("query 3", "document 3", "a negative"),  # 31: a duplicate
        row(" query 3", "document 3", "a negative"),
        row("query 3document 3", "a negative", "nn"),
        row("query 3", "document 3a negative", "nn"),
        b"",
        b"not json",  # 36
        b'{"query": "\xff", "document": "d", "negative": "n"}',
        row("query", "half \ud800", "negative"),
        b"[1, 2]",  # 39: invalid
        row("query", "document", 7),
        row(" \t", "document", "negative"),  # 41: empty
        row(None, "document", "negative"),
        row("query", "document", ""),
        row("q", "document", "negative"),  # 44: too short
        row("query", " d ", "negative"),
        row("query", "document"),  # 46: too few documents
        row("query", "x" * 501, "negative"),  # 47: too long
        row("query 7", "document 7", "a negative"),  # 48: a duplicate
        {"title": "of another kind"},  # 49: invalid
    ]
    path = _write(tmp_path / "rows.jsonl", records)
    builder = file_builder(str(path), tmp_path / "out", cleaning={"min_documents": 2})
    manifest = builder.prepare()
    assert manifest["dropped"] == {
        "undecodable": 3,
        "too_long": 1,
        "empty": 3,
        "invalid": 3,
        "too_few_documents": 1,
        "too_short": 2,
        "duplicate": 2,
    }
    assert set(manifest["dropped"]) < set(cleaning.REASONS)
    assert manifest["kept"] == 33 == len(_all(builder))
    assert manifest["read"] == manifest["kept"] + sum(manifest["dropped"].values()) == 48
    first = {kind: text.split(": ", 1) for kind, text in manifest["first_dropped"].items()}
    numbers = {kind: place.removeprefix(f"{path}, row ") for kind, (place, _) in first.items()}
    assert numbers == {
        "undecodable": "36",
        "too_long": "47",
        "empty": "41",
        "invalid": "39",
        "too_few_documents": "46",
        "too_short": "44",
        "duplicate": "31",
    }
    assert all(len(reason) > 10 for _, reason in first.values())


def test_the_first_of_repeated_rows_stays_wherever_the_others_are(tmp_path):
    once, twice = _pairs(55, "once"), _pairs(40, "twice")
    _write(tmp_path / "rows-0.jsonl", [*twice[:20], *once, *twice[10:30]])
    _write(tmp_path / "rows-1.jsonl", [*twice[25:], *once[::-1], *twice, *twice])
    builder = file_builder(str(tmp_path / "rows-*.jsonl"), tmp_path / "out")
    manifest = builder.prepare()
    assert _all(builder) == _expected([*twice[:20], *once, *twice[20:30], *twice[30:]])
    assert manifest["dropped"] == {"duplicate": 10 + 5 + 55 + 80}
    assert manifest["first_dropped"]["duplicate"].startswith(f"{tmp_path}/rows-0.jsonl, row 76: ")
    builder = file_builder(
        str(tmp_path / "rows-*.jsonl"), tmp_path / "all", cleaning={"deduplicate": False}
    )
    assert builder.prepare()["kept"] == 245


def test_documents_beyond_the_most_are_cut_and_rows_that_are_equal_then_are_repeated(tmp_path):
    path = _write(tmp_path / "rows.jsonl", [*_scored(30), _scored(1, candidates=6)[0]])
    builder = file_builder(str(path), tmp_path / "out", cleaning={"max_documents": 3})
    manifest = builder.prepare()
    assert manifest["documents"] == [3, 3] and manifest["dropped"] == {"duplicate": 1}
    wanted = [
        (row["query"], row["documents"][:3], np.array(row["scores"][:3], np.float32).tolist())
        for row in _scored(30)
    ]
    assert [tuple(row.values()) for row in _all(builder)] == wanted
    builder = file_builder(str(path), tmp_path / "all")
    assert builder.prepare()["documents"] == [4, 6]


def test_a_row_has_enough_documents_if_it_had_before_it_was_cut(tmp_path):
    path = _write(tmp_path / "rows.jsonl", _scored(30))
    cleaning = {"min_documents": 5, "max_documents": 2}
    manifest = file_builder(str(path), tmp_path / "out", cleaning=cleaning).prepare()
    assert manifest["dropped"] == {"too_few_documents": 10}
    assert manifest["kept"] == 20 and manifest["documents"] == [2, 2]


def test_shards_of_which_nothing_is_kept_are_left_out(tmp_path):
    good, bad = _pairs(30), [{"query": " ", "document": "d"}] * 65
    path = _write(tmp_path / "rows.jsonl", [*bad, *good[:15], *bad, *good[15:]])
    builder = file_builder(str(path), tmp_path / "out")
    manifest = builder.prepare()
    assert _all(builder) == _expected(good)
    assert min(shard["kept"] for shard in manifest["shards"]) > 0
    assert manifest["dropped"] == {"empty": 130}


def test_a_source_without_a_usable_row_is_refused_with_the_first_of_each_reason(tmp_path):
    lines = [{"query": " ", "document": "d"}, b"{", {"query": "a", "document": "bc"}]
    path = _write(tmp_path / "rows.jsonl", lines)
    for _ in range(2):
        with pytest.raises(UserError, match="none of 3 rows") as caught:
            file_builder(str(path), tmp_path / "out").prepare()
        for row in (1, 2, 3):
            assert f"{path}, row {row}: " in str(caught.value)
    assert not list((tmp_path / "out").rglob("manifest.json"))


@pytest.mark.parametrize("at", [5, 45])
def test_rows_with_and_without_scores_do_not_mix(tmp_path, at):
    plain = {"query": "query", "pos": ["positive"], "neg": ["negative"]}
    records = [plain | {"query": f"query {i}"} for i in range(70)]
    records[at] |= {"pos_scores": [1.0], "neg_scores": [0.0]}
    path = _write(tmp_path / "rows.jsonl", records)
    with pytest.raises(UserError, match=f"row {at + 1} is with scores.*all rows of a source"):
        file_builder(str(path), tmp_path / "out").prepare()
    halves = [row | {"pos_scores": [1.0], "neg_scores": [0.0]} for row in records[:20]]
    path = _write(tmp_path / "halves.jsonl", halves + records[60:])
    with pytest.raises(UserError, match=r"without scores.*all rows of a source"):
        file_builder(str(path), tmp_path / "out").prepare()


# --- stopped and started again ---


def _source_and_tokenizer(folder, tokenizer_file):
    """A text source in four shards, and a tokenizer."""
    path = _write(folder / "rows.jsonl", [*_pairs(67), _pairs(1)[0], {"query": "", "document": ""}])
    builder = file_builder(str(path), folder / "whole")
    builder.prepare()
    return path, TextSource(builder.folder), _tokenizer(tokenizer_file)


def _tokenizer(tokenizer_file, **settings):
    special = {f"{name}_token": f"[{name.upper()}]" for name in ("unk", "cls", "sep", "pad")}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(tokenizer_file), mask_token="[MASK]", **special
    )
    settings = {"query_prompt": "search_query: ", "document_prompt": "search_document: "} | settings
    return ColbertTokenizer(tokenizer, TokenizationConfig(**settings))


_CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree")


def _before_each_change(act):
    """Calls `act(number)` before each change of the file system, and at every fifth record."""
    number = itertools.count()

    def hook(event, arguments):
        writes = event == "open" and (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR)
        if event in _CHANGES or writes:
            act(next(number))

    write, records = shards._checked, itertools.count()

    def checked(path, *arguments):
        if next(records) % 5 == 0:
            act(next(number))
        return write(path, *arguments)

    shards._checked = checked
    sys.addaudithook(hook)


def _prepare_and_die(before, count, make, *arguments):
    """Prepares; is killed just before a change, or writes down how many there are."""
    _small_shards()
    builder = make(*arguments)
    last = [0]

    def act(number):
        last[0] = number
        if number == before:
            os.kill(os.getpid(), signal.SIGKILL)

    _before_each_change(act)
    builder.prepare()
    total = last[0]
    count.write_text(str(total + 1))


def _make_text(path, folder):
    return file_builder(str(path), folder)


def _make_tokens(folder, tokenizer_file):
    text = next(folder.glob("files/*/1.0.0"))
    return TokenBuilder(TextSource(text), _tokenizer(tokenizer_file))


def _finished_shards(folder):
    """Inodes and times of the shards that were whole when the program was killed."""
    found = set()
    for told in folder.rglob("shard-*.json"):
        shard = told.with_suffix(".array_record")
        if shard.exists() and json.loads(told.read_text())["bytes"] == shard.stat().st_size:
            found.add((shard.stat().st_ino, shard.stat().st_mtime_ns))
    return found


def _facts(manifest):
    """A manifest without the bytes of its files, which may differ for the same rows."""
    return {
        **manifest,
        "shards": [(s["name"], s["kept"], s["rows_sha256"]) for s in manifest["shards"]],
    }


def _no_half_is_taken_for_whole(folder, kind, expected):
    for manifest in folder.rglob("manifest.json"):
        if (kind is TokenSource) != ("tokens" in manifest.relative_to(folder).parts):
            continue
        try:
            source = kind(manifest.parent)
        except UserError:
            continue
        assert _plain(source.__getitems__(range(len(source)))) == expected


def _plain(found):
    return json.loads(json.dumps(found, default=lambda array: array.tolist()))


@pytest.mark.parametrize("kind", ["text", "tokens"])
def test_a_killed_preparation_goes_on_where_it_stopped(tmp_path, tokenizer_file, kind):
    path, text, tokenizer = _source_and_tokenizer(tmp_path, tokenizer_file)
    if kind == "text":
        whole, make, opened = text, _make_text, TextSource

        def arguments(folder):
            return path, folder

    else:
        folder = tmp_path / "whole"
        tokens = TokenBuilder(text, tokenizer)
        tokens.prepare()
        whole, make, opened = TokenSource(tokens.folder), _make_tokens, TokenSource

        def arguments(folder):
            if not folder.exists():
                file_builder(str(path), folder).prepare()
            return folder, tokenizer_file

    reference, expected = _facts(whole.manifest), _plain(list(whole))
    assert len(reference["shards"]) == 4 and len(expected) == 67
    count = tmp_path / "count"
    assert _run(_prepare_and_die, -1, count, make, *arguments(tmp_path / "counted")) == 0
    changes, kept, died_unprepared = int(count.read_text()), [], 0
    for before in range(0, changes, 1 if kind == "text" else 2):
        folder = tmp_path / f"killed-{before}"
        given = arguments(folder)
        assert _run(_prepare_and_die, before, count, make, *given) == -signal.SIGKILL
        _no_half_is_taken_for_whole(folder, opened, expected)
        finished, builder = _finished_shards(folder), make(*given)
        prepared = builder.is_prepared()
        manifest = builder.prepare()
        assert _facts(manifest) == reference, before
        assert _plain(list(opened(builder.folder))) == expected, before
        for shard in manifest["shards"]:
            data = (builder.folder / shard["name"]).read_bytes()
            assert hashlib.sha256(data).hexdigest() == shard["sha256"]
        if prepared:  # only what lies beside it was left to remove
            continue
        died_unprepared += 1
        files = [builder.folder / shard["name"] for shard in manifest["shards"]]
        written = {(file.stat().st_ino, file.stat().st_mtime_ns) for file in files}
        assert finished <= written, f"killed before change {before}: finished shards are rewritten"
        assert not _leftovers(folder), f"killed before change {before}"
        kept.append(len(finished))
    assert died_unprepared > 12 and set(kept) == {0, 1, 2, 3, 4}


def _die_when_published(path, folder):
    """Is killed at the first change after the folder got its name."""
    _small_shards()
    builder = file_builder(str(path), folder)
    published = []

    def hook(event, arguments):
        if event in _CHANGES and published:
            os.kill(os.getpid(), signal.SIGKILL)
        if event == "os.rename" and str(arguments[1]) == str(builder.folder):
            published.append(True)

    sys.addaudithook(hook)
    builder.prepare()


def test_what_a_program_left_that_was_killed_at_its_last_step_goes_too(tmp_path):
    path, folder = _write(tmp_path / "rows.jsonl", _pairs(50)), tmp_path / "out"
    assert _run(_die_when_published, path, folder) == -signal.SIGKILL
    builder = file_builder(str(path), folder)
    assert builder.is_prepared() and _leftovers(folder)
    assert builder.prepare()["kept"] == 50 == len(_all(builder))
    assert not _leftovers(folder)


def _count_writes(monkeypatch):
    """The numbers of the shards that are written from now on."""
    written, write = [], builders.write_shard

    def counted(job, shard, *arguments):
        written.append(shard.number)
        return write(job, shard, *arguments)

    monkeypatch.setattr(builders, "write_shard", counted)
    return written


def test_a_failure_after_the_last_shard_costs_no_shard(tmp_path, monkeypatch):
    path = _write(tmp_path / "rows.jsonl", _pairs(67))
    reference = _facts(file_builder(str(path), tmp_path / "whole").prepare())
    with monkeypatch.context() as patched:
        write = builders.write_durably

        def full(path, text):
            if path.name == "manifest.json":
                raise OSError(errno.ENOSPC, "No space left on device")
            write(path, text)

        patched.setattr(builders, "write_durably", full)
        with pytest.raises(UserError, match=r"cannot be written \(No space left on device\)"):
            file_builder(str(path), tmp_path / "out").prepare()
    written = _count_writes(monkeypatch)
    assert _facts(file_builder(str(path), tmp_path / "out").prepare()) == reference
    assert written == []


def test_a_file_system_without_second_names_will_do(tmp_path, monkeypatch):
    def unsupported(*_, **__):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", unsupported)
    path = _write(tmp_path / "rows.jsonl", _pairs(50))
    builder = file_builder(str(path), tmp_path / "out")
    builder.prepare()
    assert _all(builder) == _expected(_pairs(50)) and not _leftovers(tmp_path)


def _stop_before(monkeypatch, number):
    """Lets a preparation stop before it writes a certain shard."""
    write = builders.write_shard

    def stopped(job, shard, *arguments):
        if shard.number == number:
            raise KeyboardInterrupt
        return write(job, shard, *arguments)

    monkeypatch.setattr(builders, "write_shard", stopped)


def test_only_shards_that_are_missing_or_not_as_they_were_are_written(tmp_path, monkeypatch):
    path = _write(tmp_path / "rows.jsonl", _pairs(95))
    reference = _facts(file_builder(str(path), tmp_path / "whole").prepare())
    builder = file_builder(str(path), tmp_path / "out")
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        _stop_before(patched, 4)
        builder.prepare()
    shards = sorted(builder.unfinished.glob("shard-*.array_record"))
    assert len(shards) == 4
    shards[0].write_bytes(shards[0].read_bytes()[:-1])
    shards[1].unlink()
    shards[2].with_suffix(".json").write_text("{")
    written = _count_writes(monkeypatch)
    monkeypatch.setattr(text_module, "find_duplicates", None)  # they are known already
    assert _facts(file_builder(str(path), tmp_path / "out").prepare()) == reference
    assert written == [0, 1, 2, 4]
    assert not _leftovers(tmp_path / "out")


@pytest.mark.parametrize("name", ["plan.json", "duplicates.npy", "request.json"])
def test_any_note_of_an_unfinished_preparation_may_be_lost(tmp_path, monkeypatch, name):
    path = _write(tmp_path / "rows.jsonl", [*_pairs(70), *_pairs(25)])
    reference = _facts(file_builder(str(path), tmp_path / "whole").prepare())
    builder = file_builder(str(path), tmp_path / "out")
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        _stop_before(patched, 2)
        builder.prepare()
    (builder.unfinished / name).unlink()  # as a removal that was killed leaves it
    assert _facts(file_builder(str(path), tmp_path / "out").prepare()) == reference


def test_shards_of_another_request_are_thrown_away(tmp_path, monkeypatch):
    path = _write(tmp_path / "rows.jsonl", [*_pairs(50), *_pairs(45)])
    builder = file_builder(str(path), tmp_path / "out")
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        _stop_before(patched, 3)
        builder.prepare()
    written = _count_writes(monkeypatch)
    other = file_builder(str(path), tmp_path / "out", cleaning={"deduplicate": False})
    assert other.prepare()["kept"] == 95 and _all(other) == _expected([*_pairs(50), *_pairs(45)])
    assert written == [0, 1, 2, 3, 4]
    assert not _leftovers(tmp_path / "out")


def test_a_stopped_preparation_is_described_by_the_file_it_was_made_of(tmp_path, monkeypatch):
    path = _write(tmp_path / "rows.jsonl", _pairs(95, "old"))
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        _stop_before(patched, 3)
        file_builder(str(path), tmp_path / "out").prepare()
    _write(path, _pairs(95, "new"))
    os.utime(path, (1, 1))  # a change that even the same size cannot hide
    builder = file_builder(str(path), tmp_path / "out")
    builder.prepare()
    assert _all(builder) == _expected(_pairs(95, "new"))


# --- a folder that is prepared ---


def test_a_prepared_source_is_taken_as_it_is(tmp_path, monkeypatch):
    path = _write(tmp_path / "rows.jsonl", _pairs(30))
    first = file_builder(str(path), tmp_path / "out", cleaning={"min_characters": 5}).prepare()
    monkeypatch.setattr(corpora.Files, "open_table", None)  # nothing is read again
    assert file_builder(str(path), tmp_path / "out").prepare() == first
    assert first == file_builder(
        str(path), tmp_path / "out", cleaning={"min_characters": 5}
    ).prepare(wait=True)


def test_a_file_is_the_same_source_however_its_path_is_written(tmp_path, monkeypatch):
    _write(tmp_path / "rows.jsonl", _pairs(30))
    monkeypatch.chdir(tmp_path)
    first = file_builder("rows.jsonl", tmp_path / "out")
    first.prepare()
    second = file_builder(str(tmp_path / "rows.jsonl"), tmp_path / "out")
    assert second.folder == first.folder
    assert second.prepare()["kept"] == 30


def test_other_options_than_a_source_was_prepared_with_are_refused(tmp_path):
    path = _write(tmp_path / "rows.jsonl", _pairs(30))
    file_builder(str(path), tmp_path / "out", cleaning={"min_characters": 5}).prepare()
    with pytest.raises(UserError, match=r"'min_characters': 5.*'min_characters': 6.*remove it"):
        file_builder(str(path), tmp_path / "out", cleaning={"min_characters": 6}).prepare()
    with pytest.raises(UserError, match=r"filter=None, not 'mine'"):
        some = RowFilter("mine", 1, lambda sample: None)
        file_builder(str(path), tmp_path / "out", row_filter=some).prepare()
    assert len(_all(next((tmp_path / "out").glob("files/*/1.0.0")))) == 30


@pytest.mark.parametrize("name", ["dataset_info.json", "manifest.json"])
def test_a_damaged_source_is_not_prepared_over_but_named(tmp_path, name):
    path = _write(tmp_path / "rows.jsonl", _pairs(30))
    folder = file_builder(str(path), tmp_path / "out").folder
    file_builder(str(path), tmp_path / "out").prepare()
    (folder / name).write_text((folder / name).read_text()[:200])
    with pytest.raises(UserError, match="remove it"):
        open_corpus(CONFIG | {"files": (str(path),), "cache_dir": str(tmp_path / "out")})
    shard = folder / "files-train.array_record-00000-of-00002"
    assert shard.exists()


# --- two at once ---


def _slow_filter(started, go):
    def make(sample):
        started.set()
        assert go.wait(60)
        return lambda block: [True] * len(block)

    return RowFilter("slow", 1, make)


def _prepare_slowly(path, folder, started, go):
    _small_shards()
    file_builder(str(path), folder, row_filter=_slow_filter(started, go)).prepare()


def test_a_second_preparation_is_refused_or_waits_and_the_first_ends_unharmed(tmp_path):
    path = _write(tmp_path / "rows.jsonl", _pairs(50))
    started, go = _FORKS.Event(), _FORKS.Event()
    first = _FORKS.Process(target=_prepare_slowly, args=(path, tmp_path / "out", started, go))
    first.start()
    assert started.wait(60)
    with pytest.raises(UserError, match=r"Another preparation of .* is under way"):
        file_builder(str(path), tmp_path / "out").prepare()
    waited, refused = [], []

    def wait():
        waited.append(file_builder(str(path), tmp_path / "out").prepare(wait=True))

    def wait_for_another():
        other = file_builder(str(path), tmp_path / "out", cleaning={"min_characters": 9})
        with pytest.raises(UserError, match=r"'min_characters': 2.*'min_characters': 9") as caught:
            other.prepare(wait=True)
        refused.append(caught)

    waiting = [threading.Thread(target=target) for target in (wait, wait_for_another)]
    for thread in waiting:
        thread.start()
    for thread in waiting:
        thread.join(0.3)
        assert thread.is_alive()
    assert not waited and not refused
    go.set()
    for ended in (*waiting, first):
        ended.join(60)
    assert first.exitcode == 0 and len(refused) == 1
    assert waited[0]["request"]["filter"] == "slow" and waited[0]["kept"] == 50
    assert len(_all(file_builder(str(path), tmp_path / "out"))) == 50
    assert not _leftovers(tmp_path / "out")


@pytest.mark.parametrize("wait", [False, True])
def test_a_preparation_that_fails_lets_the_next_begin(tmp_path, wait):
    path = _write(tmp_path / "rows.jsonl", [{"query": " ", "document": "d"}])
    with pytest.raises(UserError, match="none of 1 rows") as kept:
        file_builder(str(path), tmp_path / "out").prepare(wait=wait)
    with pytest.raises(UserError, match="none of 1 rows"):
        file_builder(str(path), tmp_path / "out").prepare()
    del kept


def _open_read_only(path, folder):
    """Opens a prepared folder where every attempt at a change fails."""

    def hook(event, arguments):
        writes = event == "open" and (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR)
        if writes or (event in _CHANGES and event != "shutil.rmtree"):  # which has its own attempts
            raise OSError(errno.EROFS, "Read-only file system")

    sys.addaudithook(hook)
    assert file_builder(str(path), folder).prepare(wait=True)["kept"] == 50
    for given in (str(path), str(next(folder.glob("files/*")))):
        (source,) = open_corpus(CONFIG | {"files": (given,), "cache_dir": folder}).sources.values()
        assert len(source.__getitems__(range(50))) == 50


def test_a_prepared_source_on_a_disk_that_cannot_be_written_is_opened(tmp_path):
    path = _write(tmp_path / "rows.jsonl", _pairs(50))
    file_builder(str(path), tmp_path / "out").prepare()
    assert _run(_open_read_only, path, tmp_path / "out") == 0


def test_a_folder_that_cannot_be_written_is_the_users_to_mend(tmp_path, monkeypatch):
    path = _write(tmp_path / "rows.jsonl", _pairs(50))
    with pytest.raises(UserError, match=r"cannot be written \(Not a directory\)"):
        file_builder(str(path), path).prepare()

    def read_only(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(filelock.FileLock, "acquire", read_only)
    with pytest.raises(UserError, match=r"cannot be written \(Read-only file system\): make room"):
        file_builder(str(path), tmp_path / "out").prepare()


# --- a full disk ---


def _prepare_on_a_full_disk(limit, make, *arguments):
    """Prepares where no file may be longer; ends with status 7 and prints what the user reads."""
    _small_shards()
    builder = make(*arguments)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        builder.prepare()
    except UserError as error:
        os._exit(7 if "cannot be written" in str(error) and "make room" in str(error) else 8)


def _noise(count, size):
    random = np.random.default_rng(0)
    return [
        {"query": f"query {i}", "document": random.bytes(size).hex() + str(i)} for i in range(count)
    ]


def test_a_disk_that_fills_up_costs_only_the_shard_that_did_not_fit(tmp_path):
    records = [*_pairs(60), *_noise(40, 6000)]
    path = _write(tmp_path / "rows.jsonl", records)
    reference = _facts(file_builder(str(path), tmp_path / "whole").prepare())
    folder = tmp_path / "out"
    for _ in range(2):
        assert _run(_prepare_on_a_full_disk, 150_000, _make_text, path, folder) == 7
        finished = _finished_shards(folder)
        assert len(finished) == 3 and not list(folder.rglob("manifest.json"))
        assert not [p for p in folder.rglob("*") if "partial" in p.name or "incomplete" in p.name]
    builder = file_builder(str(path), folder)
    manifest = builder.prepare()
    assert _facts(manifest) == reference and _all(builder) == _expected(records)
    files = [builder.folder / shard["name"] for shard in manifest["shards"]]
    assert finished <= {(file.stat().st_ino, file.stat().st_mtime_ns) for file in files}
    assert not _leftovers(folder)


def test_a_disk_that_fills_up_while_tokens_are_written_leaves_the_text(tmp_path, tokenizer_file):
    path = _write(tmp_path / "rows.jsonl", [*_pairs(20), *_noise(40, 6000)])
    file_builder(str(path), tmp_path / "out").prepare()
    given = (tmp_path / "out", tokenizer_file)
    # A shard is two blocks of 64 KiB at least.
    assert _run(_prepare_on_a_full_disk, 100_000, _make_tokens, *given) == 7
    assert len(list(tmp_path.rglob("manifest.json"))) == 1
    builder = _make_tokens(*given)
    builder.prepare()
    assert len(TokenSource(builder.folder)) == 60
    assert not _leftovers(tmp_path / "out")


def test_a_disk_that_fills_up_while_duplicates_are_searched_leaves_nothing_wrong(tmp_path):
    records = [*_pairs(2000), *_pairs(50)]
    path = _write(tmp_path / "rows.jsonl", records)
    for limit in (100, 4000, 15_000):
        given = (_make_text, path, tmp_path / "out")
        assert _run(_prepare_on_a_full_disk, limit, *given) == 7
    builder = file_builder(str(path), tmp_path / "out")
    assert builder.prepare()["dropped"] == {"duplicate": 50}
    assert _all(builder) == _expected(records[:2000])
    assert not _leftovers(tmp_path / "out")


# --- a filter ---


def test_a_filter_chooses_among_the_rows_that_cleaning_leaves(tmp_path):
    records = _pairs(60)
    mixed = [*records[:30], records[4], b"{", {"query": "q", "document": "d"}, *records[30:]]
    path = _write(tmp_path / "rows.jsonl", mixed)
    samples, blocks = [], []

    def make(sample):
        samples.append(sample)

        def keep(block):
            blocks.append([row["query"] for row in block])
            return [int(row["query"].split()[2]) % 3 != 1 for row in block]

        return keep

    row_filter = RowFilter("every third", 10, make)
    builder = file_builder(str(path), tmp_path / "out", row_filter=row_filter)
    manifest = builder.prepare()
    assert _all(builder) == [row for i, row in enumerate(_expected(records)) if i % 3 != 1]
    assert manifest["dropped"] == {
        "undecodable": 1,
        "too_short": 1,
        "duplicate": 1,
        "inconsistent": 20,
    }
    assert manifest["read"] == 63 and manifest["kept"] == 40
    first = manifest["first_dropped"]["inconsistent"]
    assert first.startswith(f"{path}, row 2: ")
    assert list(itertools.chain(*blocks)) == [record["query"] for record in records]
    assert 1 < max(map(len, blocks)) <= text_module._BLOCK_ROWS
    assert manifest["request"]["filter"] == "every third"
    (sample,) = samples
    assert 8 <= len(sample) <= 10 and set(sample) <= {record["document"] for record in records}


@pytest.mark.parametrize("total, wanted", [(100, 10), (100, 60), (100, 1), (50, 200), (99, 50)])
def test_a_sample_is_drawn_from_all_over_the_source(tmp_path, total, wanted):
    path = _write(tmp_path / "rows.jsonl", _pairs(total))
    drawn = []

    def make(sample):
        drawn.extend(int(text.split()[2]) for text in sample)
        return lambda block: [True] * len(block)

    row_filter = RowFilter("all", wanted, make)
    file_builder(str(path), tmp_path / "out", row_filter=row_filter).prepare()
    assert 0.5 * min(wanted, total) <= len(drawn) <= wanted
    assert drawn == sorted(set(drawn))
    if wanted > 1:  # no large stretch is left out
        gaps = np.diff([-1, *drawn, total])
        assert gaps.max() <= max(3 * total // wanted, 3)


# --- Beam ---


def test_beam_writes_the_same_shards_and_goes_on_where_others_stopped(tmp_path, monkeypatch):
    pipeline_options = pytest.importorskip("apache_beam.options.pipeline_options")
    options = pipeline_options.PipelineOptions([])
    path = _write(
        tmp_path / "rows.jsonl.gz", [*_pairs(67), *_pairs(20), {"query": "", "document": ""}]
    )
    reference = _facts(file_builder(str(path), tmp_path / "whole").prepare())
    with_beam = file_builder(str(path), tmp_path / "beam").prepare("DirectRunner", options)
    assert _facts(with_beam) == reference and len(reference["shards"]) > 3
    builder = file_builder(str(path), tmp_path / "out")
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        _stop_before(patched, 2)
        builder.prepare()
    finished = _finished_shards(tmp_path / "out")
    manifest = file_builder(str(path), tmp_path / "out").prepare("DirectRunner", options)
    assert _facts(manifest) == reference and len(finished) == 2
    files = [builder.folder / shard["name"] for shard in manifest["shards"]]
    assert finished <= {(file.stat().st_ino, file.stat().st_mtime_ns) for file in files}
    assert not _leftovers(tmp_path)


def test_a_shard_that_beam_cannot_write_costs_no_other_shard(tmp_path):
    pipeline_options = pytest.importorskip("apache_beam.options.pipeline_options")
    options = pipeline_options.PipelineOptions([])
    records = [{"query": f"query {i}", "pos": ["positive"], "neg": []} for i in range(95)]
    records[45] |= {"pos_scores": [1.0], "neg_scores": []}
    path = _write(tmp_path / "rows.jsonl", records)
    builder = file_builder(str(path), tmp_path / "out")
    with pytest.raises(UserError, match="row 46 is with scores") as caught:
        builder.prepare("DirectRunner", options)
    assert "\n" not in str(caught.value)
    assert len(_finished_shards(tmp_path / "out")) >= 2
    assert not builder.is_prepared()
    with pytest.raises(UserError, match="NoSuchRunner"):
        builder.prepare("NoSuchRunner", options)


# --- tokens ---


@pytest.fixture(scope="module")
def real_rows(real_texts, tmp_path_factory):
    """Prepared rows of real texts, without scores and with them."""
    folder = tmp_path_factory.mktemp("real")
    texts = [text for text in real_texts if len(text.strip()) > 1]
    plain = [
        {"query": texts[i], "document": texts[i + 1], "negative": texts[i + 2 : i + 2 + i % 3]}
        for i in range(0, 400, 5)
    ]
    scored = [
        {"query": texts[i], "documents": texts[i + 1 : i + 4], "scores": [0.1 * i, -i / 3, 1e-9]}
        for i in range(0, 400, 5)
    ]
    sources = {}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(text_module, "_FEWEST_ROWS", 20)
        patched.setattr(tables, "_MARK_ROWS", 10)
        for name, records in (("plain", plain), ("scored", scored)):
            path = _write(folder / f"{name}.jsonl", records)
            builder = file_builder(str(path), folder / "out")
            assert builder.prepare()["kept"] == 80
            sources[name] = TextSource(builder.folder)
    return sources


LENGTHS = {"query_length": 48, "document_length": 300}


@pytest.fixture(scope="module")
def tokenized(real_rows, tokenizer_file):
    """The same in tokens."""
    corpus = {}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(tokens_module, "_BLOCK_ROWS", 7)
        for name, source in real_rows.items():
            builder = TokenBuilder(source, _tokenizer(tokenizer_file, **LENGTHS), "a model")
            builder.prepare()
            corpus[name] = TokenSource(builder.folder)
    return corpus


@pytest.mark.parametrize("name", ["plain", "scored"])
def test_token_rows_are_the_tokens_of_the_text_rows(real_rows, tokenized, tokenizer_file, name):
    text, tokens = real_rows[name], tokenized[name]
    tokenizer = _tokenizer(tokenizer_file, **LENGTHS)
    assert isinstance(tokens, Source)
    for attribute in ("min_documents", "max_documents", "has_scores", "shard_lengths"):
        assert getattr(tokens, attribute) == getattr(text, attribute)
    assert len(tokens) == len(text) == 80
    order = np.random.default_rng(0).permutation(80)
    total = 0
    for row, ids in zip(text.__getitems__(order), tokens.__getitems__(order), strict=True):
        (query,) = tokenizer.query_ids([row["query"]])
        documents = tokenizer.document_ids(row["documents"])
        assert ids["query"].tolist() == query and ids["query"].dtype == np.uint16
        assert [document.tolist() for document in ids["documents"]] == documents
        assert all(document.dtype == np.uint16 for document in ids["documents"])
        assert ids["scores"] == row["scores"]  # float32 both, None where there are none
        total += len(query) + sum(map(len, documents))
    assert tokens.manifest["tokens"] == total
    assert tokens[7]["query"].tolist() == tokens.__getitems__([7])[0]["query"].tolist()


def test_scores_are_kept_to_the_bit_in_32(real_rows, tokenized):
    wanted = np.array([[0.1 * i, -i / 3, 1e-9] for i in range(0, 400, 5)], np.float32)
    for source in (real_rows["scored"], tokenized["scored"]):
        scores = np.array([row["scores"] for row in source.__getitems__(range(80))], np.float32)
        assert (scores == wanted).all()


def test_the_manifest_of_tokens_says_whose_they_are(tokenized, tokenizer_file):
    tokenizer = _tokenizer(tokenizer_file, **LENGTHS)
    assert tokenized["plain"].manifest["tokenizer"] == {
        "name": "a model",
        "fingerprint": tokenizer.fingerprint(),
        "vocab_size": tokenizer.vocab_size,
        "query_prompt": "search_query: ",
        "document_prompt": "search_document: ",
        **LENGTHS,
    }


@pytest.mark.parametrize(
    "expansion",
    [
        {},
        {"do_query_expansion": False},
        {"attend_to_expansion_tokens": True},
    ],
)
@pytest.mark.parametrize("name", ["plain", "scored"])
def test_tokens_give_the_batches_of_texts_at_every_shorter_length(
    real_rows, tokenized, tokenizer_file, name, expansion
):
    text = real_rows[name].__getitems__(range(80))
    tokens = tokenized[name].__getitems__(range(80))
    documents = real_rows[name].min_documents
    for rows_of_one in (text, tokens):
        for i, row in enumerate(rows_of_one):
            rows_of_one[i] = rows.cut_documents(row, documents)
    for query, document in [*((n, n + 1) for n in range(4, 12)), (31, 77), (47, 299), (48, 300)]:
        lengths = {"query_length": query, "document_length": document}
        encode = make_encode(_tokenizer(tokenizer_file, **lengths, **expansion))
        ours, wanted = encode(tokens, documents), encode(text, documents)
        assert wanted["query"]["input_ids"].shape == (80, query)
        assert wanted["document"]["input_ids"].shape == (80, documents, document)
        for side in ("query", "document"):
            for key in ("input_ids", "attention_mask", "scoring_mask"):
                assert ours[side][key].dtype == wanted[side][key].dtype
                np.testing.assert_array_equal(ours[side][key], wanted[side][key])
        assert (name == "scored") == ("scores" in ours) == ("scores" in wanted)
        if name == "scored":
            np.testing.assert_array_equal(ours["scores"], wanted["scores"])


def test_tokens_are_cut_as_texts_are_where_no_special_token_ends_them(tmp_path, tokenizer_file):
    def tokenizer(**lengths):
        ours = _tokenizer(tokenizer_file)
        backend = ours.tokenizer.backend_tokenizer
        backend.post_processor = tokenizers.processors.TemplateProcessing(
            single="[CLS] $A", special_tokens=[("[CLS]", backend.token_to_id("[CLS]"))]
        )
        return ColbertTokenizer(ours.tokenizer, TokenizationConfig(**lengths))

    texts = ["one two three four five six seven eight nine ten eleven"]
    long, short = tokenizer(), tokenizer(query_length=6, document_length=8)
    np.testing.assert_array_equal(
        short.document_batch(long.document_ids(texts))["input_ids"],
        short.documents(texts)["input_ids"],
    )


def test_ids_take_two_bytes_while_they_fit_and_four_beyond(tmp_path):
    for size, kind in ((3000, "uint16"), (65_536, "uint16"), (65_537, "uint32")):
        features = token_features(size, False)
        assert features["query"].np_dtype == features["documents"].np_dtype == np.dtype(kind)
    words = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]", *(f"w{i}" for i in range(70_000))]
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]")
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = _tokenizer(tmp_path / "tokenizer.json", query_prompt="", document_prompt="")
    path = _write(tmp_path / "rows.jsonl", [{"query": "w69999 w3", "document": "w65535 w65536"}])
    text = file_builder(str(path), tmp_path / "out")
    text.prepare()
    builder = TokenBuilder(TextSource(text.folder), tokenizer)
    builder.prepare()
    row = TokenSource(builder.folder)[0]
    assert row["query"].dtype == row["documents"][0].dtype == np.uint32
    assert row["query"].tolist()[2:] == [70_004, 8, 2]
    assert row["documents"][0].tolist()[2:] == [65_540, 65_541, 2]


def test_tokens_are_opened_for_their_own_tokenizer_at_their_lengths_and_below(
    real_rows, tokenized, tokenizer_file
):
    for lengths in (LENGTHS, {"query_length": 4, "document_length": 4}, {"query_length": 9}):
        given = {"document_length": 100} | lengths
        tokenizer = _tokenizer(tokenizer_file, do_query_expansion=False, **given)
        opened = open_tokens(Corpus(dict(real_rows)), tokenizer)
        assert list(opened.sources) == list(real_rows)
        for name, source in opened.sources.items():
            assert isinstance(source, TokenSource) and source.folder == tokenized[name].folder


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"query_length": 49}, r"query_length=48.*query_length=49"),
        ({"document_length": 301}, r"document_length=300.*document_length=301"),
        ({"query_prompt": "Frage: "}, r"'search_query: ' and 'search_document: '.*'Frage: '"),
        ({"document_prompt": ""}, r"'search_query: ' and 'search_document: '.*''"),
        ({"query_prefix": "[Query] "}, "a model.*launch/prepare.py"),
        ({"do_lower_case": True}, "a model.*launch/prepare.py"),
    ],
)
def test_tokens_that_would_not_be_the_models_are_refused(
    real_rows, tokenized, tokenizer_file, settings, message
):
    tokenizer = _tokenizer(tokenizer_file, **LENGTHS | settings)
    with pytest.raises(UserError, match=message) as caught:
        open_tokens(Corpus({"plain": real_rows["plain"]}), tokenizer)
    assert "Source plain" in str(caught.value) and "\n" not in str(caught.value)


def test_a_source_without_tokens_says_how_to_make_them(tmp_path, tokenizer_file):
    path = _write(tmp_path / "rows.jsonl", _pairs(3))
    corpus = open_corpus(CONFIG | {"files": (str(path),), "cache_dir": tmp_path / "out"})
    with pytest.raises(UserError, match=r"rows .*has no tokens.*--tokenizer"):
        open_tokens(corpus, _tokenizer(tokenizer_file))


def test_tokens_of_two_tokenizers_lie_beside_each_other(tmp_path, tokenizer_file):
    path = _write(tmp_path / "rows.jsonl", _pairs(30))
    text = file_builder(str(path), tmp_path / "out")
    text.prepare()
    source = TextSource(text.folder)
    for prompt in ("one: ", "another: "):
        tokenizer = _tokenizer(tokenizer_file, query_prompt=prompt)
        builder = TokenBuilder(source, tokenizer)
        builder.prepare()
        row = open_tokens(Corpus({"a": source}), tokenizer).sources["a"][0]
        assert row["query"].tolist() == tokenizer.query_ids([source[0]["query"]])[0]
        with pytest.raises(UserError, match=r"document_length=180, not 190"):
            longer = _tokenizer(tokenizer_file, query_prompt=prompt, document_length=190)
            TokenBuilder(source, longer).prepare()
        # Those that are there hold all that is asked for.
        shorter = _tokenizer(tokenizer_file, query_prompt=prompt, document_length=60)
        assert TokenBuilder(source, shorter).prepare()["tokenizer"]["document_length"] == 180
    assert len(_all(text)) == 30  # tokens within a folder do not disturb it


def test_tokens_of_other_text_are_refused(tmp_path, tokenizer_file):
    sources = []
    for name in ("one", "other"):
        path = _write(tmp_path / name / "rows.jsonl", _pairs(30, name))
        text = file_builder(str(path), tmp_path / "out")
        text.prepare()
        sources.append(TextSource(text.folder))
    tokenizer = _tokenizer(tokenizer_file)
    TokenBuilder(sources[0], tokenizer).prepare()
    (sources[0].folder / "tokens").rename(sources[1].folder / "tokens")
    with pytest.raises(UserError, match="tokenized from other text"):
        open_tokens(Corpus({"a": sources[1]}), tokenizer)
    with pytest.raises(UserError, match="was prepared with text="):
        TokenBuilder(sources[1], tokenizer).prepare()


# --- a tokenizer's fingerprint ---


def test_a_fingerprint_outlives_saving_and_ignores_what_decides_no_id(tmp_path, tokenizer_file):
    tokenizer = _tokenizer(tokenizer_file)
    fingerprint = tokenizer.fingerprint()
    for generation in range(2):
        tokenizer.tokenizer.save_pretrained(tmp_path / str(generation))
        tokenizer = ColbertTokenizer(load_tokenizer(tmp_path / str(generation)), tokenizer.config)
        assert tokenizer.fingerprint() == fingerprint
    for settings in (
        {"query_length": 9, "document_length": 700},
        {"do_query_expansion": False},
        {"attend_to_expansion_tokens": True},
        {"skiplist_words": ()},
    ):
        assert _tokenizer(tokenizer_file, **settings).fingerprint() == fingerprint
    tokenizer.tokenizer("a text", truncation=True, max_length=5, padding="max_length")
    assert tokenizer.fingerprint() == fingerprint


def test_a_fingerprint_tells_tokenizers_apart_that_give_other_ids(tmp_path, tokenizer_file):
    fingerprints = [_tokenizer(tokenizer_file).fingerprint()]
    for settings in (
        {"query_prompt": "q: "},
        {"document_prompt": "d: "},
        {"query_prompt": "search_document: ", "document_prompt": "search_query: "},
        {"query_prefix": "[Query] "},
        {"document_prefix": ""},
        {"do_lower_case": True},
    ):
        fingerprints.append(_tokenizer(tokenizer_file, **settings).fingerprint())
    state = json.loads(tokenizer_file.read_text())
    vocabulary = dict(state["model"]["vocab"])
    one, other = sorted(vocabulary, key=vocabulary.get)[-2:]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    changes = [
        {"normalizer": {"type": "NFKC"}},
        {"pre_tokenizer": state["pre_tokenizer"] | {"add_prefix_space": True}},
        {"model": state["model"] | {"vocab": vocabulary}},
        {"model": state["model"] | {"merges": state["model"]["merges"][:-1]}},
        {"added_tokens": state["added_tokens"][:-1]},
    ]
    for i, change in enumerate(changes):
        path = tmp_path / f"{i}.json"
        path.write_text(json.dumps(state | change))
        fingerprints.append(_tokenizer(path).fingerprint())
    assert len(set(fingerprints)) == len(fingerprints)
