r"""Mines hard negatives for pairs with a trained model.

    python launch/mine.py --model=runs/pretrain --pairs=pairs.jsonl --output=mined.jsonl
    python launch/train.py --config=configs/supervised.py --config.input.files="('mined.jsonl',)" \
        --config.init_from=runs/pretrain

For each pair the documents that the model ranks highest for the query, save its own and those that
score more than --margin of it: they are likely answers that nobody has marked.
"""

from absl import flags

from colbert_jax import cli
from colbert_jax.programs.retriever import define_model_flags
from colbert_jax.retrieval.index import DTYPES

MODEL = define_model_flags("model", "The model that mines")
PAIRS = flags.DEFINE_list("pairs", None, "Files of rows with query and document, as for training.")
CORPUS = flags.DEFINE_string(
    "corpus",
    None,
    "Documents to mine from beside the pairs' own, as BEIR's corpus.jsonl.",
)
OUTPUT = flags.DEFINE_string("output", None, "The file to write: .jsonl, .jsonl.gz or .parquet.")
DEPTH = flags.DEFINE_integer("depth", 100, "How far down a ranking to look.", lower_bound=1)
NEGATIVES = flags.DEFINE_integer("negatives", 10, "Negatives of each pair.", lower_bound=1)
SKIP = flags.DEFINE_integer("skip", 0, "Pass over the first so many of a ranking.", lower_bound=0)
MARGIN = flags.DEFINE_string(
    "margin", "0.95", "The fraction of its own document's score that a negative may reach; or none."
)
INDEX_DTYPE = flags.DEFINE_enum("index_dtype", "bfloat16", list(DTYPES), "How embeddings are kept.")


def main() -> None:
    """Mines."""
    from colbert_jax.programs.mine import Mining, margin_value, mine

    mining = Mining(
        depth=DEPTH.value,
        negatives=NEGATIVES.value,
        margin=margin_value(MARGIN.value),
        skip=SKIP.value,
        dtype=INDEX_DTYPE.value,
    )
    mine(MODEL(), PAIRS.value, CORPUS.value, OUTPUT.value, mining)


if __name__ == "__main__":
    cli.run_program(main, required=["model", "pairs", "output"])
