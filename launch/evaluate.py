"""Measures a model on test collections: nDCG@10, MRR@10, Recall@100, MAP.

    python launch/evaluate.py --model=my-colbert --dataset=scifact --output=results
    python launch/evaluate.py --model=lightonai/ColBERT-Zero --dataset=nanobeir --output=results

--dataset is a folder in BEIR's layout (or a folder of such folders, which count as one), nanobeir,
beir/NAME, or several with commas between them. --output gets metrics.json and, for each collection,
a TREC run.
"""

from absl import flags

from colbert_jax import cli
from colbert_jax.programs.retriever import define_model_flags
from colbert_jax.retrieval.metrics import DEFAULT_METRICS

MODEL = define_model_flags("model", "The model to measure")
DATASET = flags.DEFINE_list("dataset", None, "Test collections.")
SPLIT = flags.DEFINE_string("split", None, "Which judgements; BEIR's own by default, mostly test.")
OUTPUT = flags.DEFINE_string("output", None, "The folder to write results to.")
METRICS = flags.DEFINE_list("metrics", list(DEFAULT_METRICS), "Names that ir_measures knows.")
BM25 = flags.DEFINE_boolean("bm25", False, "Measure BM25 beside the model.")


def main() -> None:
    """Evaluates."""
    from colbert_jax.programs.evaluate import evaluate_model

    evaluate_model(MODEL(), DATASET.value, SPLIT.value, OUTPUT.value, METRICS.value, BM25.value)


if __name__ == "__main__":
    cli.run_program(main, required=["model", "dataset", "output"])
