"""What reads foreign input, as functions of bytes; each raises where a promise is broken.

`test_fuzz_corpus.py` runs them over the files in `corpus/`. With atheris installed they are targets
of coverage-guided fuzzing:

    python tests/fuzz/fuzz_readers.py json_lines NEW_INPUTS tests/fuzz/corpus/json_lines \
        -max_total_time=300
"""

import atexit
import functools
import importlib
import json
import math
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    import atheris

    with atheris.instrument_imports(include=["colbert_jax"]):  # its branches guide the fuzzer
        for name in ("data.tables", "huggingface", "retrieval.collection"):
            importlib.import_module(f"colbert_jax.{name}")

import numpy as np

from colbert_jax import huggingface
from colbert_jax.colbert import ColbertConfig, DenseConfig, init_params
from colbert_jax.data import rows, tables
from colbert_jax.errors import UserError
from colbert_jax.huggingface import Model
from colbert_jax.modernbert import ModernBertConfig
from colbert_jax.retrieval import collection
from colbert_jax.tokenization import ColbertTokenizer, TokenizationConfig, train_tokenizer

CORPUS = Path(__file__).with_name("corpus")
LONGEST_SENTENCE = 2_000  # characters; nobody reads more, and a terminal drowns in a megabyte
KINDS = {"empty", "undecodable", "too_long", "invalid", "no_text"}

# --- promises ---


def check_sentence(error: UserError | rows.RowError) -> None:
    """A message is one line that can be read."""
    text = str(error)
    assert text.strip(), "there is no message"
    assert len(text.splitlines()) == 1, f"not one line: {text!r}"
    assert len(text) <= LONGEST_SENTENCE, f"{len(text)} characters: {text[:200]!r}"


def check_text(text: Any) -> None:
    """A text has words and can be written as UTF-8."""
    assert isinstance(text, str) and text.strip()
    text.encode()


def check_row(row: rows.Row | rows.RowError) -> None:
    """A row is of the form that `Row` promises, or says why it is none."""
    if isinstance(row, rows.RowError):
        check_sentence(row)
        assert row.kind in KINDS
        return
    assert set(row) == {"query", "documents", "scores"}
    check_text(row["query"])
    assert isinstance(row["documents"], list) and row["documents"]
    for document in row["documents"]:
        check_text(document)
    if row["scores"] is not None:
        assert len(row["scores"]) == len(row["documents"])
        assert all(type(score) is float and math.isfinite(score) for score in row["scores"])


def comparable(found: Iterable[tuple[Any, rows.Row | rows.RowError]]) -> list[Any]:
    """Rows in a form that `==` compares; errors are no equal objects."""
    return [
        (place, str(row) if isinstance(row, rows.RowError) else dict(row)) for place, row in found
    ]


def check_rows_file(path: Path) -> list[tuple[int, rows.Row | rows.RowError]] | None:
    """A file gives rows, the same in parts, or one sentence (then None is returned)."""
    try:
        whole = list(rows.read_rows(path))
    except UserError as error:
        check_sentence(error)
        return None
    for _, row in whole:
        check_row(row)
    numbers = [number for number, _ in whole]
    assert numbers == sorted(set(numbers)) and all(number > 0 for number in numbers)
    parts = rows.split_table(path, 2)
    joined = [found for part in parts for found in rows.read_rows(path, None, part)]
    assert comparable(joined) == comparable(whole)
    return whole


def check_model_folder(folder: Path) -> Model | None:
    """A folder gives a model with weights that fit it, or one sentence (then None is returned)."""
    try:
        model = huggingface.read_model(str(folder))
        params = huggingface.read_weights(str(folder), model, seed=0)
        check_tokens(model.tokenizer, ["some words", ""])
    except UserError as error:
        check_sentence(error)
        return None
    for weight in huggingface.weight_table(model.config.encoder):
        array = huggingface.get_path(params, weight.path)
        expected = np.empty(weight.factored, np.bool_).transpose(weight.order).shape
        assert array.dtype == np.float32 and array.shape == expected
    for index, dense in enumerate(model.config.projection):
        kernel = params["projection"][index]["kernel"]
        assert kernel.shape == (dense.in_features, dense.out_features)
    return model


def check_tokens(tokenizer: ColbertTokenizer, texts: Sequence[str]) -> None:
    """Ids, masks and pieces of texts hang together, and a text alone has the ids it has in a batch.

    Raises:
      UserError: the tokenizer cannot encode these texts.
    """
    config = tokenizer.config
    for ids_of, pieces_of, marker, longest in (
        (tokenizer.query_ids, tokenizer.query_pieces, config.query_prefix, config.query_length),
        (
            tokenizer.document_ids,
            tokenizer.document_pieces,
            config.document_prefix,
            config.document_length,
        ),
    ):
        together = ids_of(texts)
        assert len(together) == len(texts)
        for text, ids in zip(texts, together, strict=True):
            assert ids == ids_of([text])[0]
            assert len(ids) <= longest
            assert all(0 <= token < tokenizer.vocab_size for token in ids)
            if marker:
                marker_id = tokenizer.tokenizer.convert_tokens_to_ids(marker)
                assert marker_id in ids[:2]
            pieces = pieces_of(text)
            assert len(pieces) == len(ids)
            for piece in pieces:
                if piece.span is not None:
                    start, end = piece.span
                    assert 0 <= start < end <= len(text)
    queries = tokenizer.queries(texts)
    shape = (len(texts), config.query_length)
    _check_batch(queries, shape, tokenizer.query_ids(texts), tokenizer)
    documents = tokenizer.documents(texts)
    ids = tokenizer.document_ids(texts)
    width = max(map(len, ids), default=0)
    _check_batch(documents, (len(texts), width), ids, tokenizer)
    assert not (documents["scoring_mask"] & ~documents["attention_mask"]).any()
    fixed = tokenizer.documents(texts, config.document_length)
    _check_batch(fixed, (len(texts), config.document_length), ids, tokenizer)
    for name in fixed:
        assert np.array_equal(fixed[name][:, :width], documents[name])


def _check_batch(
    batch: dict[str, np.ndarray],
    shape: tuple[int, int],
    ids: list[list[int]],
    tokenizer: ColbertTokenizer,
) -> None:
    assert {name: array.shape for name, array in batch.items()} == dict.fromkeys(
        ("input_ids", "attention_mask", "scoring_mask"), shape
    )
    assert batch["input_ids"].dtype == np.int32
    assert batch["attention_mask"].dtype == batch["scoring_mask"].dtype == np.bool_
    for row, attended, own in zip(batch["input_ids"], batch["attention_mask"], ids, strict=True):
        assert row[: len(own)].tolist() == own and attended[: len(own)].all()
        assert (row[len(own) :] == tokenizer.pad_id).all()


# --- inputs ---


@functools.cache
def scratch() -> Path:
    """A folder that goes when the program ends."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@functools.cache
def model_folder() -> Path:
    """A tiny whole model; copies of it are what is damaged."""
    texts = ["Some words to make a tokenizer of, and a few more words.", "0 1 2 3"]
    hf_tokenizer = train_tokenizer(texts, 300)
    tokenizer = ColbertTokenizer(
        hf_tokenizer, TokenizationConfig(query_length=8, document_length=12)
    )
    encoder = ModernBertConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=8,
        intermediate_size=4,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    config = ColbertConfig(encoder, (DenseConfig(8, 4),))
    fields = huggingface.encoder_json(
        encoder,
        cls=hf_tokenizer.cls_token_id,
        sep=hf_tokenizer.sep_token_id,
        pad=hf_tokenizer.convert_tokens_to_ids("[PAD]"),
    )
    params = {
        "encoder": init_params(config, 0)["encoder"],
        "projection": init_params(config, 0)["projection"],
    }
    folder = scratch() / "sound"
    huggingface.save_model(folder, Model(config, tokenizer, fields, "random"), params, "# A model")
    return folder


@functools.cache
def sound_tokenizers() -> tuple[ColbertTokenizer, ...]:
    """Tokenizers that differ in all that decides how texts become tokens."""
    settings: list[dict[str, Any]] = [
        {},
        {"query_prefix": "", "document_prefix": "", "do_query_expansion": False},
        {"query_prompt": "search_query: ", "document_prompt": " d: ", "do_lower_case": True},
        {"attend_to_expansion_tokens": True, "query_length": 4, "document_length": 4},
    ]
    return tuple(
        huggingface.read_tokenizer(str(model_folder()), overrides=setting) for setting in settings
    )


JSON_FILES = (
    "config.json",
    "modules.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "config_sentence_transformers.json",
    "sentence_bert_config.json",
    "1_Dense/config.json",
)
TENSORS = ("model.safetensors", "1_Dense/model.safetensors")
MODEL_FILES = (*JSON_FILES, *TENSORS, "model.safetensors.index.json")


def json_lines(data: bytes) -> None:
    """A file of JSON lines."""
    path = scratch() / "rows.jsonl"
    path.write_bytes(data)
    check_rows_file(path)


def gzipped_lines(data: bytes) -> None:
    """A gzipped file of JSON lines."""
    path = scratch() / "rows.jsonl.gz"
    path.write_bytes(data)
    check_rows_file(path)


def parquet(data: bytes) -> None:
    """A Parquet file."""
    path = scratch() / "rows.parquet"
    path.write_bytes(data)
    check_rows_file(path)


def joined(data: bytes) -> None:
    """A table of ids, whose lists may be texts."""
    path, texts = scratch() / "ids.jsonl", scratch() / "texts.sqlite"
    path.write_bytes(data)
    if not texts.exists():
        for name in ("queries", "documents"):
            column = "query_id" if name == "queries" else "document_id"
            lines = [json.dumps({column: one, "text": f"text {one}"}) for one in ("1", "2")]
            (scratch() / f"{name}.jsonl").write_text("\n".join(lines))
        tables.index_texts(
            texts,
            {name: [(name, scratch() / f"{name}.jsonl")] for name in ("queries", "documents")},
        )
    table = tables.JoinedTable((path,), ("ids",), texts, {})
    try:
        for stretch in table.stretches():
            for _, row in table.read(stretch):
                check_row(row)
    except UserError as error:
        check_sentence(error)


def safetensors(data: bytes) -> None:
    """The weights of a model; bytes that begin with a brace are a header that lacks its length."""
    if data[:1] == b"{":
        data = len(data).to_bytes(8, "little") + data + bytes(4096)
    damaged(b"\x07" + data)


def model_file(data: bytes) -> None:
    """One file of a model folder; the first byte says which."""
    damaged(data)


def damaged(data: bytes) -> None:
    """A model of which the file that the first byte names holds the other bytes."""
    folder = scratch() / "damaged"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(model_folder(), folder)
    name = MODEL_FILES[(data[0] if data else 0) % len(MODEL_FILES)]
    if name == "model.safetensors.index.json":  # is read where there is no file of that name
        (folder / "model.safetensors").rename(folder / "shard.safetensors")
    (folder / name).write_bytes(data[1:])
    check_model_folder(folder)


def texts(data: bytes) -> None:
    """Texts, ended by zero bytes; what is no UTF-8 becomes halves of surrogate pairs."""
    which = (data[0] if data else 0) % len(sound_tokenizers())
    found = data[1:].decode("utf-8", "surrogateescape").split("\0")
    check_tokens(sound_tokenizers()[which], found)


BEIR_FILES = ("corpus.jsonl", "queries.jsonl", "qrels/test.tsv")


def beir(data: bytes) -> None:
    """One file of a BEIR folder; the first byte says which."""
    folder = scratch() / "beir"
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    (folder / "corpus.jsonl").write_text('{"_id": "1", "title": "t", "text": "a document"}\n')
    (folder / "queries.jsonl").write_text('{"_id": "1", "text": "a query"}\n')
    (folder / "qrels/test.tsv").write_text("query-id\tcorpus-id\tscore\n1\t1\t1\n")
    (folder / BEIR_FILES[(data[0] if data else 0) % 3]).write_bytes(data[1:])
    check_beir(folder)


def check_beir(folder: Path) -> collection.Collection | None:
    """A BEIR folder gives a collection that is whole, or one sentence (then None is returned)."""
    try:
        found = collection.read_beir(folder)
    except UserError as error:
        check_sentence(error)
        return None
    assert found.documents and found.qrels and set(found.queries) == set(found.qrels)
    for judged in found.qrels.values():
        assert judged and set(judged) <= set(found.documents)
        assert all(type(relevance) is int for relevance in judged.values())
    for text in (*found.documents, *found.documents.values(), *found.queries.values()):
        assert isinstance(text, str)
        text.encode()
    return found


TARGETS: dict[str, Callable[[bytes], None]] = {
    function.__name__: function
    for function in (
        json_lines,
        gzipped_lines,
        parquet,
        joined,
        safetensors,
        model_file,
        texts,
        beir,
    )
}


def main() -> None:
    """Fuzzes the target named first; all other arguments are libFuzzer's."""
    name, *arguments = sys.argv[1:]
    model_folder()  # made before the clock of the first input runs
    atheris.Setup([sys.argv[0], *arguments], TARGETS[name])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
