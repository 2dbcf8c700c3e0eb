"""An index keeps what the model gave, in memory and on disk, and survives being killed."""

import contextlib
import json
import os
import random
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from tiny_model import make_table, make_tokenizer, table_embed, table_scores

from colbert_jax.errors import UserError
from colbert_jax.retrieval import encode, index
from colbert_jax.retrieval.encode import Encoder
from colbert_jax.retrieval.index import (
    DTYPES,
    Index,
    build_index,
    fingerprint,
    is_finished,
    open_index,
    quantize,
)
from colbert_jax.retrieval.search import top_k
from colbert_jax.sharding import make_mesh

pytestmark = pytest.mark.usefixtures("quick_compilation")

CHUNK = 16
ORIGIN = {"model": "m", "corpus": "c"}
LENGTH = 30


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "CHUNK", CHUNK)
    monkeypatch.setattr(encode, "CHUNK", CHUNK)


def make_encoder(tokenizer_file: Path, **settings: Any) -> Encoder:
    settings = {"query_length": 8, "document_length": LENGTH} | settings
    tokenizer = make_tokenizer(tokenizer_file, **settings)
    return Encoder(table_embed, tokenizer, make_mesh(devices=jax.devices()[:2]), batch_size=3)


@pytest.fixture(scope="module")
def encoder(tokenizer_file: Path) -> Encoder:
    # What has punctuation alone keeps no token at all.
    return make_encoder(tokenizer_file, skiplist_words=(*".?!", "[CLS]", "[SEP]", "[D] "))


@pytest.fixture(scope="module")
def params(encoder: Encoder) -> Any:
    return encoder.place(make_table(encoder.tokenizer))


@pytest.fixture(scope="module")
def documents(real_texts: list[str]) -> list[tuple[str, str]]:
    """Four shards, the last one not full, of texts of every kind."""
    texts = real_texts[:45]
    texts += ["", "?!", "half \ud83d a pair", "two\nlines\r\n", "\u65e5\u672c \U0001f600", "a\0b"]
    random.Random(0).shuffle(texts)
    names = [f"{'é ' if i % 3 else ''}{i}" for i in range(len(texts))]
    random.Random(1).shuffle(names)
    return list(zip(names, texts, strict=True))


class Corpus:
    """Documents that fail to come after some; counts how often it is begun."""

    def __init__(self, documents: list[tuple[str, str]], fails_at: int | None = None):
        self.documents, self.fails_at, self.begun = documents, fails_at, 0

    def __call__(self) -> Iterator[tuple[str, str]]:
        self.begun += 1
        for number, document in enumerate(self.documents):
            if number == self.fails_at:
                raise KeyboardInterrupt
            yield document


def files_of(folder: Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def kept(one: Index) -> list[np.ndarray]:
    """Every document's embeddings, as float32."""
    block = one.take(range(len(one)), len(one))
    embeddings = np.asarray(block.embeddings, np.float32)
    if block.scales is not None:
        embeddings = embeddings * block.scales[..., None]
    return [rows[mask] for rows, mask in zip(embeddings, block.mask, strict=True)]


def expected(encoder: Encoder, params: Any, texts: list[str]) -> list[np.ndarray]:
    """The embeddings that MaxSim may use of each text, straight from the table."""
    table = np.asarray(params["table"])
    table = table / np.linalg.norm(table, axis=-1, keepdims=True)
    batch = encoder.tokenizer.documents(texts)
    rows = zip(batch["input_ids"], batch["scoring_mask"], strict=True)
    return [table[ids[mask]] for ids, mask in rows]


@pytest.fixture(scope="module", params=list(DTYPES))
def dtype(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def on_disk(
    tmp_path: Path, encoder: Encoder, params: Any, documents: list[tuple[str, str]], dtype: str
) -> Index:
    folder = tmp_path / "index"
    return open_index(folder, encoder, params, lambda: documents, ORIGIN, dtype)


# --- what is kept ---


def test_it_keeps_the_models_embeddings(
    encoder: Encoder, params: Any, documents: list[tuple[str, str]], on_disk: Index, dtype: str
) -> None:
    in_memory = build_index(encoder, params, documents, dtype)
    truth = expected(encoder, params, [text for _, text in documents])
    assert sum(len(rows) == 0 for rows in truth) >= 2  # some have nothing that scores
    for one in (in_memory, on_disk):
        assert len(one) == len(documents) and len(one.shards) == 4
        assert one.ids == [name for name, _ in documents]
        assert one.tokens == sum(map(len, truth))
        size = 8 * np.dtype(DTYPES[dtype]).itemsize + (4 if dtype == "int8" else 0)
        assert one.nbytes == one.tokens * size
        for position, (_, text) in enumerate(documents):
            assert one.text(position) == text
        for ours, theirs in zip(kept(one), truth, strict=True):
            assert ours.shape == theirs.shape
            if dtype == "float32":
                np.testing.assert_allclose(ours, theirs, atol=1e-7)
            elif dtype == "bfloat16":
                rounded = theirs.astype(ml_dtypes.bfloat16).astype(np.float32)
                np.testing.assert_allclose(ours, rounded, rtol=2**-7)
            else:  # at most half a step of 127 to the largest number of a token
                steps = np.abs(theirs).max(axis=1, initial=0, keepdims=True) / 127
                assert (np.abs(ours - theirs) <= 0.5001 * steps).all()
    for ours, theirs in zip(kept(in_memory), kept(on_disk), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("size", [4, 16, 100])
def test_blocks_hold_each_document_once(on_disk: Index, size: int) -> None:
    whole = kept(on_disk)
    seen = []
    for block in on_disk.blocks(size):
        assert block.embeddings.shape[:2] == block.mask.shape == (size, block.mask.shape[1])
        assert block.mask.shape[1] in encode.document_lengths(LENGTH)
        assert not block.mask[len(block.positions) :].any()
        values = np.asarray(block.embeddings, np.float32)
        if block.scales is not None:
            values = values * block.scales[..., None]
        for row, position in enumerate(block.positions):
            np.testing.assert_array_equal(values[row][block.mask[row]], whole[position])
            seen.append(int(position))
    assert sorted(seen) == list(range(len(on_disk)))


def test_any_documents_can_be_taken_in_any_order(on_disk: Index) -> None:
    whole = kept(on_disk)
    rng = np.random.default_rng(0)
    for positions in ([3], [50, 0, 50, 50, 17], rng.integers(0, len(on_disk), 40)):
        block = on_disk.take(positions, 40)
        np.testing.assert_array_equal(block.positions, positions)
        values = np.asarray(block.embeddings, np.float32)
        if block.scales is not None:
            values = values * block.scales[..., None]
        for row, position in enumerate(positions):
            np.testing.assert_array_equal(values[row][block.mask[row]], whole[position])
        assert not block.mask[len(positions) :].any()
        lengths = on_disk.lengths_of(np.asarray(positions))
        np.testing.assert_array_equal(lengths, [len(whole[p]) for p in positions])
    assert len(on_disk.lengths_of(np.zeros(0, np.int64))) == 0


def test_a_search_finds_what_float64_finds_in_what_is_kept(
    encoder: Encoder, params: Any, on_disk: Index
) -> None:
    texts = [on_disk.text(i) for i in (1, 9, 30)]
    queries = encoder.queries(params, texts)
    found = top_k(queries, on_disk.blocks(8), on_disk.ids, 10, encoder.mesh)
    for query, hits in zip(queries.embeddings.astype(np.float64), found, strict=True):
        scores = {
            name: (query @ rows.T.astype(np.float64)).max(axis=1).sum() if len(rows) else 0.0
            for name, rows in zip(on_disk.ids, kept(on_disk), strict=True)
        }
        assert len(hits) == 10
        for name, score in hits.items():
            np.testing.assert_allclose(score, scores[name], atol=1e-5)
        assert min(hits.values()) >= sorted(scores.values())[-10] - 1e-5


def test_exact_embeddings_give_the_models_own_scores(
    encoder: Encoder, params: Any, documents: list[tuple[str, str]]
) -> None:
    texts = [text for _, text in documents]
    one = build_index(encoder, params, documents, "float32")
    found = top_k(encoder.queries(params, texts[:2]), one.blocks(8), one.ids, 100, encoder.mesh)
    scores = table_scores(params, encoder.tokenizer, texts[:2], texts)
    for hits, row in zip(found, scores, strict=True):
        np.testing.assert_allclose([hits[name] for name, _ in documents], row, atol=1e-5)


def test_quantized_numbers_are_near_and_none_is_lost() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((50, 16)).astype(np.float32) * np.logspace(-30, 10, 50)[:, None]
    x = np.concatenate([x, np.zeros((1, 16))]).astype(np.float32)
    whole, scales = quantize(x)
    assert whole.dtype == np.int8 and scales.dtype == np.float32
    assert np.abs(whole.astype(int)).max() == 127
    error = np.abs(whole * scales[:, None].astype(np.float64) - x)
    assert (error <= 0.5001 * scales[:, None]).all()
    assert not whole[-1].any() and scales[-1] == 0
    empty, none = quantize(np.zeros((0, 16), np.float32))
    assert empty.shape == (0, 16) and none.shape == (0,)


def test_what_is_no_number_stays_none(dtype: str) -> None:
    x = np.array([[1.0, np.nan], [1.0, 2.0]], np.float32)
    with np.errstate(invalid="ignore"):
        if dtype == "int8":
            whole, scales = quantize(x)
            back = whole * scales[:, None]
        else:
            back = x.astype(DTYPES[dtype]).astype(np.float32)
    assert np.isnan(back[0]).any() and np.isfinite(back[1]).all()


def test_an_empty_corpus_is_an_index_of_nothing(
    tmp_path: Path, encoder: Encoder, params: Any
) -> None:
    for one in (
        build_index(encoder, params, []),
        open_index(tmp_path / "index", encoder, params, lambda: [], ORIGIN),
        open_index(tmp_path / "index", encoder, params, lambda: [], ORIGIN),
    ):
        assert len(one) == one.tokens == one.nbytes == 0 and list(one.blocks(4)) == []
        queries = encoder.queries(params, ["text"])
        assert top_k(queries, one.blocks(4), one.ids, 3, encoder.mesh) == [{}]


def test_a_corpus_of_which_nothing_scores(
    tmp_path: Path, encoder: Encoder, params: Any, dtype: str
) -> None:
    corpus = [(str(i), "?!") for i in range(20)]
    for _ in range(2):
        one = open_index(tmp_path / "index", encoder, params, lambda: corpus, ORIGIN, dtype)
        assert one.tokens == 0
        queries = encoder.queries(params, ["text"])
        (hits,) = top_k(queries, one.blocks(6), one.ids, 3, encoder.mesh)
        assert hits == {"0": 0.0, "1": 0.0, "10": 0.0}


def test_a_document_as_long_as_a_book(tmp_path: Path, encoder: Encoder, params: Any) -> None:
    book = " ".join(f"word{i}" for i in range(100_000))
    corpus = [("short", "a list"), ("book", book), ("none", "")]
    one = open_index(tmp_path / "index", encoder, params, lambda: corpus, ORIGIN)
    assert one.text(1) == book and [one.text(0), one.text(2)] == ["a list", ""]
    assert one.lengths_of(np.array([1]))[0] == LENGTH - 3  # the three that are skipped here


def test_progress_counts_every_document(
    tmp_path: Path, encoder: Encoder, params: Any, documents: list[tuple[str, str]]
) -> None:
    counts: list[int] = []
    build_index(encoder, params, documents, progress=counts.append)
    assert sum(counts) == len(documents) and max(counts) <= encoder.block_size
    corpus = Corpus(documents, fails_at=40)
    with pytest.raises(KeyboardInterrupt):
        open_index(tmp_path / "index", encoder, params, corpus, ORIGIN)
    counts.clear()
    open_index(
        tmp_path / "index", encoder, params, lambda: documents, ORIGIN, progress=counts.append
    )
    assert sum(counts) == len(documents)


# --- on disk ---


def test_it_is_opened_again_without_the_corpus_or_the_model(
    tmp_path: Path, encoder: Encoder, params: Any, documents: list[tuple[str, str]], dtype: str
) -> None:
    corpus = Corpus(documents)
    arguments = (encoder, params, corpus, ORIGIN, dtype)
    first = open_index(tmp_path / "index", *arguments)
    files = files_of(tmp_path / "index")
    assert is_finished(tmp_path / "index") and corpus.begun == 1
    arguments = (encoder, None, corpus, ORIGIN, dtype)  # nothing is encoded
    second = open_index(tmp_path / "index", *arguments)
    assert corpus.begun == 1 and files_of(tmp_path / "index") == files
    for ours, theirs in zip(kept(first), kept(second), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("fails_at", [0, 1, 16, 33, 48, 50])
def test_killed_anywhere_it_goes_on_to_the_same_bytes(
    tmp_path: Path,
    encoder: Encoder,
    params: Any,
    documents: list[tuple[str, str]],
    monkeypatch: pytest.MonkeyPatch,
    fails_at: int,
) -> None:
    open_index(tmp_path / "whole", encoder, params, lambda: documents, ORIGIN, "int8")
    folder = tmp_path / "index"
    with pytest.raises(KeyboardInterrupt):
        open_index(folder, encoder, params, Corpus(documents, fails_at), ORIGIN, "int8")
    finished = fails_at // CHUNK
    assert len(list(folder.glob("shard-?????"))) == finished and not is_finished(folder)
    # What a process that is killed while it writes leaves behind.
    leftover = folder / f"shard-{finished:05d}.unfinished"
    leftover.mkdir()
    (leftover / "embeddings.npy").write_bytes(b"half")
    (leftover / "strange").write_bytes(b"")
    (folder / "finished.json.partial").write_text("{")
    encoded = []
    encode_shard = index._encode_shard
    monkeypatch.setattr(index, "_encode_shard", lambda *a: encoded.append(a[3]) or encode_shard(*a))
    open_index(folder, encoder, params, lambda: documents, ORIGIN, "int8")
    assert encoded == list(range(finished * CHUNK, len(documents), CHUNK))
    files = files_of(folder)
    files.pop("finished.json.partial", None)
    assert files == files_of(tmp_path / "whole")


def test_killed_while_a_shard_is_written_it_leaves_no_half(
    tmp_path: Path,
    encoder: Encoder,
    params: Any,
    documents: list[tuple[str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    open_index(tmp_path / "whole", encoder, params, lambda: documents, ORIGIN)
    for count, name in enumerate(("embeddings", "positions", "lengths", "text_ends"), 1):
        folder = tmp_path / name
        save, seen = np.save, []

        def fail(path: Path, array: np.ndarray, name=name, save=save, seen=seen) -> None:
            seen.append(path)
            if path.stem == name and path.parent.name.startswith("shard-00002"):
                path.write_bytes(b"\x93NUMPY")
                raise KeyboardInterrupt
            save(path, array)

        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(np, "save", fail)
            open_index(folder, encoder, params, lambda: documents, ORIGIN)
        assert len(seen) == 8 + count
        open_index(folder, encoder, params, lambda: documents, ORIGIN)
        assert files_of(folder) == files_of(tmp_path / "whole")


def test_a_full_disk_is_the_users_and_costs_no_finished_shard(
    tmp_path: Path,
    encoder: Encoder,
    params: Any,
    documents: list[tuple[str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "index"
    write = index._write_shard

    def fail(path: Path, *rest: Any) -> None:
        if path.name == "shard-00001":
            raise OSError(28, "No space left on device")
        write(path, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(index, "_write_shard", fail)
        with pytest.raises(UserError, match=r"index cannot be written \(No space left on device\)"):
            open_index(folder, encoder, params, lambda: documents, ORIGIN)
    before = files_of(folder / "shard-00000")
    assert len(open_index(folder, encoder, params, lambda: documents, ORIGIN)) == len(documents)
    assert files_of(folder / "shard-00000") == before


def test_more_shards_than_files_may_be_open(
    tmp_path: Path,
    encoder: Encoder,
    params: Any,
    documents: list[tuple[str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(index, "CHUNK", 1)
    folder = tmp_path / "index"
    open_index(folder, encoder, params, lambda: documents, ORIGIN, "int8")
    used = max(map(int, os.listdir("/proc/self/fd"))) if Path("/proc/self/fd").exists() else 100
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 20, hard))
    try:
        one = open_index(folder, encoder, params, lambda: documents, ORIGIN, "int8")
        assert len(one.shards) == len(documents)
        assert len(kept(one)) == len(documents)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_embeddings_on_disk_are_not_loaded(on_disk: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    monkeypatch.setattr(
        np,
        "fromfile",
        lambda path, dtype, count, offset: read.append(count) or np.zeros(count, dtype),
    )
    assert len(on_disk) and on_disk.tokens and on_disk.nbytes and on_disk.text(0) is not None
    assert not read
    longest = int(on_disk.lengths_of(np.arange(len(on_disk))).max())
    on_disk.take([5], 1)
    assert 0 < sum(read) <= longest * 9  # of one document alone, embeddings and scales


# --- what does not belong together ---


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"origin": {"model": "other", "corpus": "c"}}, "model"),
        ({"origin": {"model": "m", "corpus": "other"}}, "corpus"),
        ({"dtype": "int8"}, "dtype"),
        ({"encoder": {"document_length": 20}}, "document_length"),
        ({"chunk": 32}, "shard"),
    ],
)
def test_another_index_is_refused_by_name(
    tmp_path: Path,
    tokenizer_file: Path,
    encoder: Encoder,
    params: Any,
    documents: list[tuple[str, str]],
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, Any],
    name: str,
) -> None:
    folder = tmp_path / "index"
    corpus = Corpus(documents, fails_at=20)
    with pytest.raises(KeyboardInterrupt):  # an unfinished one too
        open_index(folder, encoder, params, corpus, ORIGIN)
    before = files_of(folder)
    other = make_encoder(tokenizer_file, **change["encoder"]) if "encoder" in change else encoder
    monkeypatch.setattr(index, "CHUNK", change.get("chunk", CHUNK))
    with pytest.raises(UserError, match=rf"index is an index of another {name}: choose another"):
        open_index(
            folder,
            other,
            params,
            corpus,
            change.get("origin", ORIGIN),
            change.get("dtype", "bfloat16"),
        )
    assert files_of(folder) == before


def test_all_that_decides_embeddings_is_in_the_fingerprint(
    tokenizer_file: Path, encoder: Encoder
) -> None:
    table = make_table(encoder.tokenizer)
    same = fingerprint(table, make_tokenizer(tokenizer_file))
    assert fingerprint({"table": table["table"].copy()}, make_tokenizer(tokenizer_file)) == same
    nudged = table["table"].copy()
    nudged[-1, -1] = np.nextafter(nudged[-1, -1], 9)
    others = {
        "weights": fingerprint({"table": nudged}, make_tokenizer(tokenizer_file)),
        "names": fingerprint({"other": table["table"]}, make_tokenizer(tokenizer_file)),
    }
    for name, value in {
        "document_length": 99,
        "skiplist_words": (".",),
        "document_prefix": "[X] ",
        "document_prompt": "document: ",
        "do_lower_case": True,
    }.items():
        others[name] = fingerprint(table, make_tokenizer(tokenizer_file, **{name: value}))
    assert len({same, *others.values()}) == len(others) + 1
    assert fingerprint(table, make_tokenizer(tokenizer_file, query_length=9)) == same


@pytest.mark.parametrize("content", ["notes", "plan"])
def test_a_foreign_folder_is_left_alone(
    tmp_path: Path, encoder: Encoder, params: Any, content: str
) -> None:
    folder = tmp_path / "index"
    folder.mkdir()
    (folder / ("notes.txt" if content == "notes" else "index.json")).write_text("precious")
    with pytest.raises(UserError, match="choose another folder"):
        open_index(folder, encoder, params, lambda: [("a", "b")], ORIGIN)
    assert list(files_of(folder).values()) == [b"precious"]
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        (tmp_path / "file").write_text("precious")
        with pytest.raises(UserError, match="cannot be used"):
            open_index(path, encoder, params, lambda: [("a", "b")], ORIGIN)
    assert (tmp_path / "file").read_text() == "precious"


def test_killed_before_its_first_file_it_can_be_built(
    tmp_path: Path, encoder: Encoder, params: Any
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "index.json.partial").write_text('{"form')
    for name in ("empty", "begun", "none/yet"):
        one = open_index(tmp_path / name, encoder, params, lambda: [("a", "b")], ORIGIN)
        assert one.ids == ["a"]


SHARD_FILES = ("embeddings.npy", "scales.npy", "positions.npy", "lengths.npy", "text_ends.npy")


@pytest.mark.parametrize(
    "path",
    ["finished.json", *(f"shard-00001/{n}" for n in (*SHARD_FILES, "ids.json", "texts.bin"))],
)
@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "other"])
def test_damage_is_named(
    tmp_path: Path,
    finished: Path,
    encoder: Encoder,
    params: Any,
    documents: list[tuple[str, str]],
    path: str,
    damage: str,
) -> None:
    folder = tmp_path / "index"
    shutil.copytree(finished, folder)
    file = folder / path
    if damage == "missing":
        file.unlink()
    elif damage == "empty":
        file.write_bytes(b"")
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:-3])
    else:
        other = folder / ("index.json" if path == "finished.json" else "shard-00003") / file.name
        source = folder / "index.json" if path == "finished.json" else other
        file.write_bytes(source.read_bytes())
    if path == "finished.json" and damage == "missing":  # nothing is lost with it
        one = open_index(folder, encoder, None, lambda: documents, ORIGIN, "int8")
        assert len(one) == len(documents) and file.is_file()
        return
    with pytest.raises(
        UserError, match=r"index is a damaged index .*: remove the folder"
    ) as caught:
        open_index(folder, encoder, params, lambda: documents, ORIGIN, "int8")
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory,
    encoder: Encoder,
    params: Any,
    documents: list[tuple[str, str]],
) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "index"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(index, "CHUNK", CHUNK)
        patched.setattr(encode, "CHUNK", CHUNK)
        open_index(folder, encoder, params, lambda: documents, ORIGIN, "int8")
    return folder


@pytest.mark.parametrize("text", ["[]", "null", '{"shards": "x", "documents": 3}', "{", "3"])
def test_a_strange_end_mark_is_damage(
    tmp_path: Path, finished: Path, encoder: Encoder, params: Any, text: str
) -> None:
    folder = tmp_path / "index"
    shutil.copytree(finished, folder)
    (folder / "finished.json").write_text(text)
    with pytest.raises(UserError, match="damaged index"):
        open_index(folder, encoder, params, lambda: [], ORIGIN, "int8")


def test_fewer_shards_than_there_were_are_damage(
    tmp_path: Path, finished: Path, encoder: Encoder, params: Any
) -> None:
    folder = tmp_path / "index"
    shutil.copytree(finished, folder)
    mark = json.loads((folder / "finished.json").read_text())
    (folder / "finished.json").write_text(json.dumps(mark | {"shards": mark["shards"] - 1}))
    with pytest.raises(UserError, match="damaged index"):
        open_index(folder, encoder, params, lambda: [], ORIGIN, "int8")
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(folder)
