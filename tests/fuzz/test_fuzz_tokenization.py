"""Whatever the text, tokens keep their length, their markers and their masks."""

import numpy as np
import pytest
from fuzz_inputs import any_text, bounded
from fuzz_readers import check_tokens, sound_tokenizers
from hypothesis import given
from hypothesis import strategies as st

SPELT_OUT = ("[CLS]", "[SEP]", "[MASK]", "[PAD]", "[UNK]", "[Q] ", "[D] ", "[Q]", "search_query: ")
pieces = st.one_of(
    any_text,
    st.sampled_from(SPELT_OUT),
    st.text("\0\x01\x1b\x7f\x85\u2028\u200b\ufeff\u202e \t\r\n", max_size=5),
    st.text("İſßΣAaé\u0301\u0345\ud800\udfff", max_size=5),  # change length in lower case
)
texts = st.lists(pieces, max_size=5).map("".join)


@bounded(150)
@given(st.lists(texts, max_size=4), st.sampled_from(range(4)))
def test_any_text_becomes_tokens(texts: list[str], which: int) -> None:
    check_tokens(sound_tokenizers()[which], texts)


@bounded(150)
@given(texts, st.sampled_from(range(4)))
def test_markers_stand_behind_the_first_token_and_ends_are_kept(text: str, which: int) -> None:
    tokenizer = sound_tokenizers()[which]
    convert = tokenizer.tokenizer.convert_tokens_to_ids
    config = tokenizer.config
    for ids, marker in (
        (tokenizer.query_ids([text])[0], config.query_prefix),
        (tokenizer.document_ids([text])[0], config.document_prefix),
    ):
        assert ids[0] == convert("[CLS]") and ids[-1] == convert("[SEP]")
        assert not marker or ids[1] == convert(marker)


@bounded(60)
@given(texts)
def test_what_scores_in_a_query_is_what_the_config_says(text: str) -> None:
    for tokenizer in sound_tokenizers():
        batch = tokenizer.queries([text])
        own = np.arange(tokenizer.config.query_length) < len(tokenizer.query_ids([text])[0])
        expanded = tokenizer.config.do_query_expansion
        attended = expanded and tokenizer.config.attend_to_expansion_tokens
        assert (batch["scoring_mask"][0] == (own | expanded)).all()
        assert (batch["attention_mask"][0] == (own | attended)).all()


@pytest.mark.parametrize(
    "text",
    [
        "a" * 1_000_000,
        " " * 1_000_000,
        "a " * 500_000,
        "\ud800" * 200_000,
        "\u0301" * 200_000,
        "[MASK]" * 100_000,
        "\U0001f468\u200d" * 100_000,
    ],
    ids=["word", "spaces", "words", "halves", "accents", "masks", "joined"],
)
def test_a_very_long_text_is_cut(text: str) -> None:
    tokenizer = sound_tokenizers()[0]
    assert tokenizer.queries([text])["input_ids"].shape == (1, tokenizer.config.query_length)
    documents = tokenizer.documents([text, "short"])
    assert documents["input_ids"].shape[1] <= tokenizer.config.document_length
    assert documents["attention_mask"].any(axis=1).all()


def test_no_text_at_all_is_an_empty_batch() -> None:
    for tokenizer in sound_tokenizers():
        check_tokens(tokenizer, [])
