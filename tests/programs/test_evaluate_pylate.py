"""launch/evaluate.py and PyLate measure the same of one exported model."""

import json
import random
import runpy
from pathlib import Path
from typing import Any

import ir_measures
import pytest
from reference.client import PyLateReference
from tiny_model import save_model
from tiny_run import CONFIGS, write_lines

from colbert_jax.huggingface import read_model
from colbert_jax.programs.evaluate import evaluate_model
from colbert_jax.programs.retriever import ModelRequest
from colbert_jax.retrieval.collection import read_beir
from colbert_jax.retrieval.metrics import evaluate_queries

pytestmark = [pytest.mark.parity, pytest.mark.usefixtures("quick_compilation")]

TOLERANCE = 0.001  # of nDCG@10
DOCUMENTS, SHORT, TWINS, QUERIES = 400, 80, 30, 60


@pytest.fixture(scope="module")
def collection(real_texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real documents of all lengths, from none, and queries that are a stretch of one of them."""
    long = [text for text in real_texts if len(text.split()) > 12]
    short = [text for text in real_texts if len(text.split()) <= 12]
    texts = [*long[:DOCUMENTS], *short[:SHORT], *long[:TWINS], "", "", f" \n {long[0]}"]
    rng = random.Random(0)
    rng.shuffle(texts)
    # Ids whose order is not the corpus's: ties are broken by id here, and by place in PyLate.
    names = [f"d{name}" for name in rng.sample(range(10_000), len(texts))]

    folder = tmp_path_factory.mktemp("collection") / "generated"
    (folder / "qrels").mkdir(parents=True)
    rows: list[dict[str, str]] = []
    for index, (name, text) in enumerate(zip(names, texts, strict=True)):
        *title, rest = text.split(" ", 3) if index % 3 == 0 else [text]
        rows.append({"_id": name, "text": rest} | ({"title": " ".join(title)} if title else {}))
    write_lines(folder / "corpus.jsonl", rows)

    asked, judged = [], ["query-id\tcorpus-id\tscore"]
    for index, source in enumerate(long[:QUERIES]):
        words = source.split()
        # Every sixth is longer than any model's queries.
        start, count = rng.randrange(6), 80 if index % 6 == 0 else 5
        asked.append({"_id": f"q{index}", "text": " ".join(words[start : start + count])})
        grades = {related: 1 for related in _most_alike(source, long[:DOCUMENTS])}
        grades |= {rng.choice(short[:SHORT]): 0, source: 3}
        # Equal texts are judged alike, as which of them comes first is chance in PyLate.
        stripped = {text.strip(): grade for text, grade in grades.items()}
        judged += [
            f"q{index}\t{name}\t{stripped[text.strip()]}"
            for name, text in zip(names, texts, strict=True)
            if text.strip() in stripped
        ]
    asked.append({"_id": "none", "text": "a query that nothing answers"})
    judged.append(f"none\t{names[0]}\t0")
    write_lines(folder / "queries.jsonl", asked)
    (folder / "qrels" / "test.tsv").write_text("\n".join(judged) + "\n", encoding="utf-8")
    return folder


def _most_alike(source: str, texts: list[str]) -> list[str]:
    """The three texts that share the most words with this one."""
    words = set(source.split())

    def shared(text: str) -> float:
        others = set(text.split())
        return len(words & others) / len(words | others)

    return sorted((text for text in texts if text != source), key=shared, reverse=True)[:3]


def shipped_settings() -> dict[str, Any]:
    """Lengths, prompts and expansion of the first phase's config."""
    config = runpy.run_path(str(CONFIGS / "pretrain.py"))["get_config"]().model
    names = (
        "query_length",
        "document_length",
        "query_prompt",
        "document_prompt",
        "do_query_expansion",
        "attend_to_expansion_tokens",
    )
    return {name: config[name] for name in names}


@pytest.mark.parametrize("settings", ["shipped", "plain"])
def test_ndcg_and_scores_are_those_of_pylate(
    pylate: PyLateReference,
    collection: Path,
    tokenizer_file: Path,
    tmp_path: Path,
    settings: str,
) -> None:
    chosen = shipped_settings() if settings == "shipped" else {"do_query_expansion": False}
    model = save_model(tmp_path / "model", tokenizer_file, **chosen)
    read = read_beir(collection)
    tokenizer = read_model(str(model)).tokenizer
    lengths = [len(ids) for ids in tokenizer.document_ids(list(read.documents.values()))]
    longest = tokenizer.config.document_length
    assert lengths.count(longest) > 20 and min(lengths) < longest / 8
    assert tokenizer.config.do_query_expansion == (settings == "shipped")

    output = tmp_path / "output"
    evaluate_model(ModelRequest(str(model), batch_size=16), [str(collection)], None, str(output))
    written = json.loads((output / "metrics.json").read_text())["collections"]["generated"]
    run: dict[str, dict[str, float]] = {}
    for hit in ir_measures.read_trec_run(str(output / "generated.run")):
        run.setdefault(hit.query_id, {})[hit.doc_id] = hit.score
    theirs = pylate.call("evaluate", folder=str(model), collection=str(collection))

    assert run.keys() == theirs["rankings"].keys() == read.qrels.keys()
    for query, hits in run.items():
        ranked = theirs["rankings"][query]
        first = list(hits.items())[:10]
        expected = [score for _, score in ranked[:10]]
        assert [score for _, score in first] == pytest.approx(expected, rel=1e-3), query
        scores = dict(ranked)
        assert dict(first) == pytest.approx({d: scores[d] for d, _ in first}, rel=1e-3), query

    ours, expected = written["metrics"]["model"]["nDCG@10"], theirs["ndcg@10"]
    each = evaluate_queries(read.qrels, run, "nDCG@10")
    differences = {q: abs(each[q] - value) for q, value in theirs["ndcg@10_of_each"].items()}
    worst = max(differences, key=differences.__getitem__)
    print(f"nDCG@10 {ours:.5f}, PyLate's {expected:.5f}; {worst} differs by {differences[worst]}")
    assert 0.05 < expected < 0.95
    assert abs(ours - expected) <= TOLERANCE
