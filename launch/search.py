"""Searches a corpus with a trained model and marks the words that matched.

    python launch/search.py --model=my-colbert --corpus=corpus.jsonl --query="heat flow"
    python launch/search.py --model=my-colbert --corpus=corpus.jsonl --interactive --index=my-index

The corpus is JSON Lines, {"_id": "...", "title": "...", "text": "..."} a line, as in BEIR. Every
document is scored for every query: the answer is exact. With --index the encoded corpus is kept on
disk, for the next time and for corpora larger than memory.
"""

from absl import flags

from colbert_jax import cli
from colbert_jax.programs.retriever import define_model_flags
from colbert_jax.retrieval.index import DTYPES

MODEL = define_model_flags("model", "The model to search with")
CORPUS = flags.DEFINE_string("corpus", None, "The documents, as BEIR's corpus.jsonl; or .jsonl.gz.")
QUERY = flags.DEFINE_multi_string("query", [], "What to search for; may be given several times.")
INTERACTIVE = flags.DEFINE_boolean(
    "interactive", False, "Ask for queries until an empty line; the corpus is encoded once."
)
K = flags.DEFINE_integer(
    "k", None, "Passages to print for each query; 5, or all of fewer, by default.", lower_bound=1
)
INDEX = flags.DEFINE_string("index", None, "Folder to keep the encoded corpus in; none: memory.")
INDEX_DTYPE = flags.DEFINE_enum(
    "index_dtype", "bfloat16", list(DTYPES), "How embeddings are kept: int8 takes half of bfloat16."
)


def main() -> None:
    """Searches."""
    from colbert_jax.programs.search import search_corpus

    search_corpus(
        MODEL(),
        CORPUS.value,
        QUERY.value,
        INTERACTIVE.value,
        K.value,
        INDEX.value,
        INDEX_DTYPE.value,
    )


if __name__ == "__main__":
    cli.run_program(main, required=["model", "corpus"])
