"""Folders of runs as training leaves them, written without a run, for tests of the report."""

import base64
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

HOSTILE = "</script><img src=x onerror=alert(1)>\"'&amp;\u2028]]>\x00\x1b[31m\ud800 שלום 🦜"
MEASURES = ("nDCG@10", "MRR@10", "Recall@100")


def make_config(**changes: Any) -> dict[str, Any]:
    """A config; changes are by dotted name with `__` for the dot."""
    config: dict[str, Any] = {
        "seed": 0,
        "total_steps": 40,
        "init_from": "",
        "mesh": {"data": -1, "fsdp": 1, "tensor": 1},
        "input": {"corpus": "docstrings", "files": [], "batch_size": 64, "max_documents": 1},
        "model": {"dtype": "float32", "lengths": 1, "encoder": {"hidden_size": 128}},
        "loss": {"kind": "contrastive", "temperature": 0.05, "masked_similarity": None},
        "optimizer": {"learning_rate": 2e-3, "warmup_steps": 20},
    }
    for name, value in changes.items():
        *path, last = name.split("__")
        section = config
        for part in path:
            section = section[part]
        section[last] = value
    return config


def make_record(**changes: Any) -> dict[str, Any]:
    session = {
        "started": "2026-11-26T08:00:00+00:00",
        "first_step": 0,
        "command": ["launch/train.py", "--config=configs/quickstart.py"],
        "backend": "cpu",
        "device_kind": "cpu",
        "devices": 1,
        "processes": 1,
        "python": "3.11.2",
        "versions": {"jax": "0.10.2", "flax": "0.12.8"},
        "compiled_lengths": None,
    }
    again = session | {"started": "2026-11-26T09:30:00+00:00", "first_step": 20}
    return {
        "sessions": [session, again],
        "parameters": 1_483_904,
        "embedding_size": 128,
        "sources": {"numpy": 6000, "jax": 3000, "flax": 1000},
        "rows_per_epoch": 10_000,
        "batches_per_epoch": 156,
    } | changes


def make_log(steps: int = 40, every: int = 2, collection: str = "held_out") -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for step in range(0, steps + 1, every):
        if step:
            rows.append(
                {
                    "step": step,
                    "train/loss": 5 / step + 0.1 * math.sin(step),
                    "train/accuracy": 1 - 1 / step,
                    "train/grad_norm": 90 / step,
                    "train/learning_rate": 2e-3 * (1 - step / steps),
                    "train/real_tokens": 0.6 + 0.1 * math.sin(step),
                    "train/pairs_per_second": 190.0,
                    "train/tokens_per_second": 17_000.0,
                    "train/mfu": 0.31,
                    "time/step": 0.5,
                    "time/data_wait": 0.01,
                }
            )
        if step % (10 * every) == 0:
            share = step / steps
            rows.append(
                {"step": step, **{f"eval/{collection}/{m}": 0.3 + 0.3 * share for m in MEASURES}}
            )
    return rows


def make_results(trained: float = 0.6, bm25: float = 0.583) -> dict[str, Any]:
    values = {"bm25": bm25, "untrained": 0.3, "trained": trained}
    return {system: {m: value for m in MEASURES} for system, value in values.items()}


QUERY = ["[CLS]", "parse", "##r", "of", "dates", "[SEP]"]
TEXTS = [
    "def parse_date(text):\n    Parses a date, in whatever format it is written.",
    "def add(a, b):\n    Adds two numbers & returns <their> sum.",
    "class Calendar:\n    Days, weeks and months.",
]


def make_document(rank: int | None, relevance: int | None, text: str, **changes: Any) -> dict:
    query = changes.get("query_tokens", QUERY)
    tokens = changes.get("document_tokens", ["[CLS]", *text.split(), "[SEP]"])
    rng = np.random.default_rng(len(text) + len(query))
    q, d = (rng.normal(size=(len(t), 8)) for t in (query, tokens))
    for i, word in enumerate(query):  # the same word has nearly the same vector
        for j, other in enumerate(tokens):
            if word.strip("#.,") == other.strip("#.,"):
                d[j] = q[i] + 0.2 * rng.normal(size=8)
    q, d = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (q, d))
    similarities = q @ d.T
    return {
        "rank": rank,
        "document_id": f"doc-{rank}",
        "text": text,
        "score": float(similarities.max(axis=1).sum()),
        "relevance": relevance,
        "query_tokens": query,
        "document_tokens": tokens,
        "winners": similarities.argmax(axis=1).tolist(),
        "similarities": base64.b64encode(
            np.round((similarities + 1) / 2 * 255).astype(np.uint8).tobytes()
        ).decode(),
    } | changes


def make_example(kind: str, number: int = 1, **changes: Any) -> dict[str, Any]:
    good = kind == "best"
    ranking = [
        make_document(1, 1 if good else 0, TEXTS[0 if good else 1]),
        make_document(2, None, TEXTS[2]),
        make_document(None, 1, TEXTS[1 if good else 0]),
    ]
    return {
        "kind": kind,
        "query_id": f"{kind}-{number}",
        "query": "parser of dates",
        "values": {"bm25": 0.0, "trained": float(good)},
        "ranking": ranking,
    } | changes


def make_evaluation(collection: str = "held_out", **changes: Any) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    by_query = {
        f"q{i}": {"bm25": round(float(rng.random()), 2), "trained": round(float(rng.random()), 2)}
        for i in range(50)
    }
    return {
        "collection": collection,
        "documents": 2000,
        "queries": 50,
        "step": 40,
        "systems": make_results(),
        "queries_by_measure": {"measure": "nDCG@10", "values": by_query},
        "examples": [make_example("best"), make_example("worst")],
    } | changes


def write_run(
    folder: Path,
    *,
    config: dict | None = None,
    record: dict | None = None,
    log: list[dict] | None = None,
    results: dict | None = None,
    evaluations: list[dict] | None = None,
) -> Path:
    """A run's folder with the files that are given."""
    folder.mkdir(parents=True)
    (folder / "train_config.json").write_text(json.dumps(config or make_config()))
    if record is not None:
        (folder / "run.json").write_text(json.dumps(record))
    if log is not None:
        lines = "".join(json.dumps(row) + "\n" for row in log)
        (folder / "metrics.jsonl").write_text(lines)
    if results is not None:
        (folder / "results.json").write_text(json.dumps(results))
    for i, evaluation in enumerate(evaluations or []):
        (folder / "evaluation").mkdir(exist_ok=True)
        (folder / "evaluation" / f"{i}.json").write_text(json.dumps(evaluation))
    return folder


def write_whole_run(folder: Path, **changes: Any) -> Path:
    """A finished run's folder."""
    parts: dict[str, Any] = {
        "record": make_record(),
        "log": make_log(),
        "results": make_results(),
        "evaluations": [make_evaluation()],
    }
    return write_run(folder, **parts | changes)


def hostile_run(folder: Path) -> Path:
    """A run in which every text that can be anything is hostile."""
    text = HOSTILE
    session = make_record()["sessions"][0] | {
        "started": text,
        "command": ["python", text],
        "device_kind": text,
        "python": text,
        "versions": {text: text},
        "compiled_lengths": {text: [1]},
    }
    document = make_document(
        1,
        1,
        text,
        document_id=text,
        query_tokens=[text[:30], "ok"],
        document_tokens=["a", text[:30]],
    )
    example = make_example(text, query_id=text, query=text, values={text: 0.5}, ranking=[document])
    return write_run(
        folder,
        config=make_config(input__corpus=text, loss__kind=text, init_from=text) | {text: text},
        record=make_record(sources={text: 1}, sessions=[session]),
        log=[{"step": 1, "train/loss": 1.0, text: 2.0, f"eval/{text}/{text}": 0.5}],
        results={text: {text: 0.5}},
        evaluations=[
            make_evaluation(
                text,
                systems={text: {text: 0.5}, "trained": {text: 0.25}},
                queries_by_measure={"measure": text, "values": {text: {"bm25": 0, "trained": 1}}},
                examples=[example, make_example("worst", query_id=text)],
            )
        ],
    )  # fmt: skip
