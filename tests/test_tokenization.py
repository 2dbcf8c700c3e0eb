"""Texts become PyLate's ids and masks, token for token."""

import json
import re
import shutil
from pathlib import Path
from typing import Any
from unicodedata import combining

import numpy as np
import pytest
from reference.client import PyLateReference
from tiny_model import make_tokenizer
from transformers import PreTrainedTokenizerFast

from colbert_jax.errors import UserError
from colbert_jax.huggingface import read_model
from colbert_jax.tokenization import (
    ColbertTokenizer,
    TokenBatch,
    TokenizationConfig,
    load_tokenizer,
    train_tokenizer,
)

PROMPTS = {"query": "search_query: ", "document": "search_document: "}


@pytest.fixture(scope="module")
def folder(
    pylate: PyLateReference, tokenizer_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    path = tmp_path_factory.mktemp("tokenization") / "model"
    pylate.call("make_model", folder=str(path), tokenizer_json=str(tokenizer_file))
    return path


def our_tokenizer(folder: Path, **settings: Any) -> ColbertTokenizer:
    return read_model(str(folder), overrides=settings).tokenizer


def check_equal(ours: TokenBatch, theirs: dict[str, np.ndarray], pad_id: int) -> None:
    """Compares two batches; ours may be wider, by padding that nothing looks at or scores."""
    width = theirs["input_ids"].shape[1]
    assert ours["input_ids"].dtype == np.int32
    assert ours["attention_mask"].dtype == ours["scoring_mask"].dtype == bool
    for name in ("input_ids", "attention_mask", "scoring_mask"):
        np.testing.assert_array_equal(ours[name][:, :width], theirs[name], err_msg=name)
    assert (ours["input_ids"][:, width:] == pad_id).all()
    assert not ours["attention_mask"][:, width:].any()
    assert not ours["scoring_mask"][:, width:].any()


SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "recipe_lengths": {"query_length": 39, "document_length": 187},
    "no_expansion": {"do_query_expansion": False},
    "attended_expansion": {"attend_to_expansion_tokens": True},
    "short": {"query_length": 4, "document_length": 7},
    "long": {"query_length": 300, "document_length": 700},
    "skiplist": {"skiplist_words": ["the", "Ġthe", ".", "Ġ", "[MASK]", "no such token"]},
    "no_skiplist": {"skiplist_words": []},
    "no_markers": {"query_prefix": "", "document_prefix": ""},
    "other_markers": {"query_prefix": "<query>", "document_prefix": "<document> "},
}


@pytest.mark.parity
@pytest.mark.parametrize(
    ("name", "prompted"),
    [*((name, False) for name in SETTINGS), ("default", True), ("no_markers", True)],
)
def test_real_texts_equal_pylate(
    pylate: PyLateReference,
    folder: Path,
    real_texts: list[str],
    name: str,
    prompted: bool,
) -> None:
    settings = SETTINGS[name]
    prompts = PROMPTS if prompted else {"query": "", "document": ""}
    ours = our_tokenizer(
        folder,
        query_prompt=prompts["query"],
        document_prompt=prompts["document"],
        **{k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()},
    )
    assert len(real_texts) >= 1000
    for is_query in (True, False):
        theirs = pylate.call(
            "tokenize",
            folder=str(folder),
            texts=real_texts,
            is_query=is_query,
            prompt=prompts["query" if is_query else "document"],
            **settings,
        )
        batch = ours.queries(real_texts) if is_query else ours.documents(real_texts)
        check_equal(batch, theirs, ours.pad_id)
        length = ours.config.query_length if is_query else ours.config.document_length
        assert batch["input_ids"].shape[1] == length  # some texts are long enough to be cut


@pytest.mark.parity
def test_lower_casing_equals_pylate(
    pylate: PyLateReference, folder: Path, real_texts: list[str], tmp_path: Path
) -> None:
    lowered = tmp_path / "model"
    shutil.copytree(folder, lowered)
    path = lowered / "sentence_bert_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"do_lower_case": True}))
    ours = our_tokenizer(lowered)
    batch = ours.documents(real_texts)
    theirs = pylate.call("tokenize", folder=str(lowered), texts=real_texts, is_query=False)
    check_equal(batch, theirs, ours.pad_id)
    cased = our_tokenizer(folder).documents(real_texts)
    assert not np.array_equal(batch["input_ids"], cased["input_ids"])


@pytest.mark.parity
def test_queries_without_expansion_equal_pylate_and_are_padded_to_their_length(
    pylate: PyLateReference, folder: Path
) -> None:
    texts = ["parse", "copy a list"]  # all shorter than a query may be
    ours = our_tokenizer(folder, do_query_expansion=False)
    theirs = pylate.call(
        "tokenize", folder=str(folder), texts=texts, is_query=True, do_query_expansion=False
    )
    assert theirs["input_ids"].shape[1] < 32
    batch = ours.queries(texts)
    assert batch["input_ids"].shape == (2, 32)
    check_equal(batch, theirs, ours.pad_id)


@pytest.mark.parity
def test_documents_of_fixed_length_equal_padded_ones_of_pylate(
    pylate: PyLateReference, folder: Path, real_texts: list[str]
) -> None:
    ours = our_tokenizer(folder)
    theirs = pylate.call("tokenize", folder=str(folder), texts=real_texts, is_query=False, pad=True)
    assert theirs["input_ids"].shape[1] == 180
    check_equal(ours.documents(real_texts, length=180), theirs, ours.pad_id)
    short = [text for text in real_texts if len(text) < 30]
    loose, fixed = ours.documents(short), ours.documents(short, length=100)
    assert loose["input_ids"].shape[1] < 100 == fixed["input_ids"].shape[1]
    check_equal(fixed, loose, ours.pad_id)


@pytest.mark.parity
def test_markers_and_special_tokens_spelt_in_a_text_equal_pylate(
    pylate: PyLateReference, folder: Path
) -> None:
    texts = [
        "[Q] what",
        "[D] that",
        "[Q]what [D]that [Q]  [D] ",
        "x[Q] y[D] z",
        "[MASK][MASK] [PAD] [CLS]a[SEP]b [UNK]",
        "  [MASK]  [SEP]",
    ]
    ours = our_tokenizer(folder)
    for is_query in (True, False):
        theirs = pylate.call("tokenize", folder=str(folder), texts=texts, is_query=is_query)
        batch = ours.queries(texts) if is_query else ours.documents(texts)
        check_equal(batch, theirs, ours.pad_id)


def test_a_text_cut_short_keeps_its_marker_and_separator(folder: Path) -> None:
    ours = our_tokenizer(folder, query_length=8, document_length=9)
    special = ours.tokenizer
    for batch, marker, length in (
        (ours.queries(["word " * 50]), "[Q] ", 8),
        (ours.documents(["word " * 50]), "[D] ", 9),
    ):
        ids = batch["input_ids"][0]
        assert len(ids) == length and batch["attention_mask"].all()
        assert ids[:2].tolist() == [special.cls_token_id, special.convert_tokens_to_ids(marker)]
        assert ids[-1] == special.sep_token_id


def test_documents_longer_than_asked_are_cut_and_none_is_no_error(folder: Path) -> None:
    ours = our_tokenizer(folder, document_length=20)
    assert ours.documents(["word " * 50], length=400)["input_ids"].shape == (1, 20)
    assert ours.documents([])["input_ids"].shape == (0, 0)
    assert ours.queries([])["input_ids"].shape == (0, 32)


def test_a_batch_does_not_change_its_texts_tokens(folder: Path, real_texts: list[str]) -> None:
    ours = our_tokenizer(folder)
    together = ours.documents(real_texts[:50], length=180)
    for row, text in enumerate(real_texts[:50]):
        alone = ours.documents([text], length=180)
        for name, array in together.items():
            np.testing.assert_array_equal(array[row], alone[name][0])


# What each token stands for.


PIECES: dict[str, dict[str, Any]] = {
    "default": {},
    "prompted": {"query_prompt": PROMPTS["query"], "document_prompt": PROMPTS["document"]},
    "lowered": {"do_lower_case": True, "query_prompt": " Q: ", "document_prompt": "\tDoc: "},
    "no_markers": {"query_prefix": "", "document_prefix": ""},
    "short": {"query_length": 4, "document_length": 7},
    "long": {"query_length": 300, "document_length": 700},
    "glued_prompt": {"query_prompt": "query", "document_prompt": "document"},
}


@pytest.mark.parametrize("name", PIECES)
def test_pieces_line_up_with_tokens_and_cut_the_text(
    tokenizer_file: Path, real_texts: list[str], name: str
) -> None:
    ours = make_tokenizer(tokenizer_file, **PIECES[name])
    known = ours.tokenizer
    texts = [*real_texts[:400], *EDGES]
    for ids_of, pieces_of, prompt in (
        (ours.query_ids, ours.query_pieces, ours.config.query_prompt),
        (ours.document_ids, ours.document_pieces, ours.config.document_prompt),
    ):
        spans = 0
        for text, ids in zip(texts, ids_of(texts), strict=True):
            pieces = pieces_of(text)
            tokens = known.convert_ids_to_tokens(ids)
            assert len(pieces) == len(tokens)
            last = 0
            for token, (label, span) in zip(tokens, pieces, strict=True):
                assert label
                if span is None:
                    continue
                spans += 1
                start, end = span
                assert 0 <= start < end <= len(text)
                cut = re.sub("[\ud800-\udfff]", "\ufffd", text[start:end])
                assert label == (cut.lower() if ours.config.do_lower_case else cut)
                assert not cut[0].isspace()
                assert last <= start  # in the order of the text
                last = start
                # The token spells what was cut, where it is not a part of a letter's bytes.
                spelt = known.convert_tokens_to_string([token])
                if spelt.isascii() and cut.isascii():
                    assert spelt.strip() == label.strip()
            if not prompt:
                covered = {i for _, s in pieces if s for i in range(*s)}
                size = ours.config.query_length if ids_of == ours.query_ids else None
                cut_off = len(ids) == (size or ours.config.document_length)
                if not cut_off:  # every letter has its token, with the accents that follow it
                    letters = {i for i, x in enumerate(text) if not (x.isspace() or combining(x))}
                    assert covered >= letters
        assert spans > 300


EDGES = (
    "\u0130stanbul is lower-cased to one letter more",
    "  \u0130  ",
    "half \ud83d a pair",
    "\ud800",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 family",
    "e\u0301 composed by the tokenizer",
    "[MASK] [SEP] [Q] [D] spelt",
    "x" * 3000,
)


def test_spans_are_none_rather_than_wrong(tokenizer_file: Path) -> None:
    ours = make_tokenizer(tokenizer_file, do_lower_case=True)
    # Lower-casing makes two letters of the first, so that all that follows is shifted.
    assert all(span is None for _, span in ours.document_pieces("\u0130 a list"))
    assert any(span for _, span in ours.document_pieces("I a list"))


def test_special_tokens_markers_and_prompts_are_not_of_the_text(tokenizer_file: Path) -> None:
    ours = make_tokenizer(tokenizer_file, query_prompt="search_query: ")
    pieces = ours.query_pieces("  parse it ")
    assert [piece.label for piece in pieces[:2]] == ["[CLS]", "[Q]"]
    assert pieces[-1].label == "[SEP]"
    of_text = [(piece.label, piece.span) for piece in pieces if piece.span]
    assert "".join(label for label, _ in of_text) == "parseit"
    assert of_text[0][1][0] == 2 and of_text[-1][1][1] == 10
    assert all(piece.span is None for piece in pieces[: -len(of_text) - 1])
    for text in ("", "  ", "\n"):
        assert not any(piece.span for piece in ours.query_pieces(text))


def test_half_a_surrogate_pair_is_tokenized_as_an_unknown_letter(tokenizer_file: Path) -> None:
    ours = make_tokenizer(tokenizer_file)
    assert ours.query_ids(["a \ud83d b"]) == ours.query_ids(["a \ufffd b"])
    assert ours.document_ids(["\udc00\ud83d"]) == ours.document_ids(["\ufffd\ufffd"])
    whole = ours.document_ids(["a \U0001f600 b"])
    assert whole != ours.document_ids(["a \ufffd b"])  # a whole pair is a letter


# Tokenizers of our own making.


@pytest.mark.parametrize("words_only", [False, True])
def test_training_twice_gives_the_same_file(
    real_texts: list[str], tmp_path: Path, words_only: bool
) -> None:
    for name in ("one", "two"):
        trained = train_tokenizer(iter(real_texts), 1000, words_only)
        assert len(trained) == 1000
        trained.save_pretrained(str(tmp_path / name))
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert "tokenizer.json" in files
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


@pytest.mark.parametrize("words_only", [False, True])
def test_a_trained_tokenizer_is_loaded_as_it_was(
    real_texts: list[str], tmp_path: Path, words_only: bool
) -> None:
    trained = train_tokenizer(real_texts, 1000, words_only)
    trained.save_pretrained(str(tmp_path))
    loaded = load_tokenizer(tmp_path)
    text = "def getItems(self, x): return café[0]  # naïve"
    ids = trained(text)["input_ids"]
    assert loaded(text)["input_ids"] == ids
    assert (ids[0], ids[-1]) == (trained.cls_token_id, trained.sep_token_id)
    if not words_only:
        kept = trained.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert kept == text
    ours = ColbertTokenizer(loaded, TokenizationConfig())
    assert ours.vocab_size == 1002
    assert ours.queries([text])["input_ids"][0, 1] == 1000


def test_words_only_makes_names_and_words_the_same_tokens(real_texts: list[str]) -> None:
    trained = train_tokenizer(real_texts, 1000, words_only=True)

    def pieces(text: str) -> list[str]:
        backend = trained.backend_tokenizer
        split = backend.pre_tokenizer.pre_tokenize_str(backend.normalizer.normalize_str(text))
        return [piece for piece, _ in split]

    assert pieces("getItems HTTPServer x12") == ["get", "items", "http", "server", "x12"]
    assert trained("self.getItems()")["input_ids"] == trained("self get_items")["input_ids"]


@pytest.mark.parity
@pytest.mark.parametrize("words_only", [False, True])
def test_texts_in_our_own_tokenizer_equal_pylate(
    pylate: PyLateReference, real_texts: list[str], tmp_path: Path, words_only: bool
) -> None:
    trained = tmp_path / "tokenizer"
    train_tokenizer(real_texts, 1000, words_only).save_pretrained(str(trained))
    folder = tmp_path / "model"
    tokenizer_json = str(trained / "tokenizer.json")
    pylate.call("make_model", folder=str(folder), tokenizer_json=tokenizer_json)
    ours = our_tokenizer(folder)
    for is_query in (True, False):
        theirs = pylate.call("tokenize", folder=str(folder), texts=real_texts, is_query=is_query)
        batch = ours.queries(real_texts) if is_query else ours.documents(real_texts)
        check_equal(batch, theirs, ours.pad_id)


# What cannot be used.


def test_a_tokenizer_without_a_mask_token_is_refused(tokenizer_file: Path) -> None:
    bare = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer_file), pad_token="[PAD]")
    with pytest.raises(UserError, match="no mask token"):
        ColbertTokenizer(bare, TokenizationConfig())


@pytest.mark.parametrize("name", ["query_length", "document_length"])
def test_lengths_too_short_are_refused(name: str) -> None:
    TokenizationConfig(**{name: 4})
    with pytest.raises(UserError, match=f"{name} is 3"):
        TokenizationConfig(**{name: 3})


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("content", ["", "{}", "{not json", '{"version": "1.0", "model": 3}'])
def test_a_damaged_tokenizer_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=str(tmp_path)):
        load_tokenizer(tmp_path)
