"""Whatever a BEIR folder holds, it gives a collection that is whole or one sentence."""

import json
from typing import Any

import pytest
from fuzz_inputs import any_text, bounded, damage, edits, values
from fuzz_readers import beir
from hypothesis import given
from hypothesis import strategies as st

LINE = b'{"_id": "1", "title": "t", "text": "a document"}\n'
QRELS = b"query-id\tcorpus-id\tscore\n1\t1\t1\n"
field = st.one_of(st.sampled_from(["1", "2", ""]), any_text, values(4))
document = st.one_of(
    st.fixed_dictionaries({"_id": field, "text": field}, optional={"title": field}), values(4)
)


@bounded(120)
@given(st.lists(document, max_size=3), st.sampled_from([b"\0", b"\x01"]), st.booleans())
def test_documents_of_any_json_give_a_collection_or_one_sentence(
    documents: list[Any], which: bytes, ascii_only: bool
) -> None:
    text = "".join(json.dumps(one, ensure_ascii=ascii_only) + "\n" for one in documents)
    beir(which + LINE + text.encode("utf-8", "surrogatepass"))


judged = st.one_of(
    st.integers(-5, 5).map(str),
    st.sampled_from(["", "1.5", "nan", "1_0", " 1", "9" * 5_000, "9" * 30, "\u0661", "-0", "+1"]),
    any_text,
)


@bounded(120)
@given(st.lists(st.tuples(field.map(str), field.map(str), judged), max_size=3), st.booleans())
def test_judgements_of_any_text_give_a_collection_or_one_sentence(
    lines: list[tuple[str, str, str]], ended: bool
) -> None:
    text = "".join("\t".join(line) + ("\r\n" if ended else "\n") for line in lines)
    beir(b"\x02query-id\tcorpus-id\tscore\n" + text.encode("utf-8", "surrogatepass"))


@bounded(120)
@given(st.sampled_from([(b"\0", LINE), (b"\x01", LINE), (b"\x02", QRELS)]), edits)
def test_damaged_files_give_a_collection_or_one_sentence(
    file: tuple[bytes, bytes], changes: list[tuple[str, float, int]]
) -> None:
    which, data = file
    beir(which + damage(data, changes))


@pytest.mark.parametrize("depth", [100, 990, 1_000, 100_000])
def test_however_deep_a_line_it_is_one_sentence(depth: int) -> None:
    beir(b"\0" + LINE + b'{"_id": "2", "text": ' + b"[" * depth + b"]" * depth + b"}\n")
