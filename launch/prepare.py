r"""Prepares a corpus for training: fetches, cleans, stores and tokenizes it, once.

    python launch/prepare.py --list
    python launch/prepare.py --corpus=nomic_unsupervised --source=squad --output=data \
        --tokenizer=answerdotai/ModernBERT-base
    python launch/prepare.py --corpus=files --source=pairs.jsonl.gz --output=data \
        --columns=query=title,document=abstract

--corpus is one that --list names, `docstrings`, `files`, or any data set of the hub as owner/name.
The same command goes on where a stopped one was. Training reads what lies in --output with
--config.input.cache_dir.
"""

from absl import flags

from colbert_jax import cli

LIST = flags.DEFINE_boolean("list", False, "Name all corpora and sources, and end.")
CORPUS = flags.DEFINE_string("corpus", None, "Which corpus.")
SOURCE = flags.DEFINE_list(
    "source", [], "Which of its sources, such as squad,npr (none: all); with files, their paths."
)
OUTPUT = flags.DEFINE_string("output", None, "The folder to keep it in.")
REVISION = flags.DEFINE_string("revision", None, "The hub's branch, tag or commit.")
COLUMNS = flags.DEFINE_list(
    "columns", [], "What a file calls our columns, such as query=question,document=answer."
)
MIN_CHARACTERS = flags.DEFINE_integer(
    "min_characters", None, "Drop rows with a shorter text; 2 by default.", lower_bound=1
)
MIN_DOCUMENTS = flags.DEFINE_integer(
    "min_documents", None, "Drop rows with fewer documents; 1 by default.", lower_bound=1
)
MAX_DOCUMENTS = flags.DEFINE_integer(
    "max_documents", None, "Keep only the first so many documents of a row.", lower_bound=1
)
DEDUPLICATE = flags.DEFINE_boolean(
    "deduplicate", None, "Drop rows that repeat one before them word for word; so by default."
)
CONSISTENCY_MODEL = flags.DEFINE_string(
    "consistency_model", None, "Drop rows whose document this model does not find for their query."
)
CONSISTENCY_TOP_K = flags.DEFINE_integer(
    "consistency_top_k", 2, "How far down it may find it.", lower_bound=1
)
CONSISTENCY_SAMPLE = flags.DEFINE_integer(
    "consistency_sample", 4096, "Among how many other documents of the source.", lower_bound=1
)
TOKENIZER = flags.DEFINE_string("tokenizer", None, "Store the tokens of this model's, too.")
TOKENIZER_REVISION = flags.DEFINE_string("tokenizer_revision", None, "Its revision on the hub.")
QUERY_PROMPT = flags.DEFINE_string("query_prompt", "search_query: ", "As in the run's config.")
DOCUMENT_PROMPT = flags.DEFINE_string(
    "document_prompt", "search_document: ", "As in the run's config."
)
QUERY_LENGTH = flags.DEFINE_integer("query_length", 39, "Tokens to store at most.")
DOCUMENT_LENGTH = flags.DEFINE_integer(
    "document_length", None, "Tokens to store at most; by default the recipe's, 187 or 519."
)
BEAM_RUNNER = flags.DEFINE_string(
    "beam_runner", None, "Write shards with Apache Beam: DirectRunner, DataflowRunner, ..."
)
BEAM_OPTIONS = flags.DEFINE_string(
    "beam_options", "", "Options of the runner, such as '--project=... --region=...'."
)


def main() -> None:
    """Prepares, or lists."""
    from colbert_jax import prepare

    if LIST.value:
        print(prepare.corpora_table())
        return
    prepare.prepare(
        prepare.Request(
            corpus=CORPUS.value,
            sources=tuple(SOURCE.value),
            output=OUTPUT.value,
            revision=REVISION.value,
            columns=prepare.parse_columns(COLUMNS.value),
            cleaning={
                flag.name: flag.value
                for flag in (MIN_CHARACTERS, MIN_DOCUMENTS, MAX_DOCUMENTS, DEDUPLICATE)
                if flag.value is not None
            },
            consistency=prepare.Consistency(
                CONSISTENCY_MODEL.value, CONSISTENCY_TOP_K.value, CONSISTENCY_SAMPLE.value
            ),
            tokenizer=TOKENIZER.value,
            tokenizer_revision=TOKENIZER_REVISION.value,
            query_prompt=QUERY_PROMPT.value,
            document_prompt=DOCUMENT_PROMPT.value,
            query_length=QUERY_LENGTH.value,
            document_length=DOCUMENT_LENGTH.value,
            beam_runner=BEAM_RUNNER.value,
            beam_options=BEAM_OPTIONS.value,
        )
    )


if __name__ == "__main__":
    cli.run_program(main)
