r"""Makes distillation rows: a teacher scores candidates, or scores of another program are imported.

    python launch/score.py --teacher=big-colbert --rows=mined.jsonl --output=scored.jsonl
    python launch/score.py --scores=scores.jsonl --queries=queries.jsonl --documents=corpus.jsonl \
        --output=scored.jsonl
    python launch/train.py --config=configs/distill.py --config.input.files="('scored.jsonl',)" \
        --config.init_from=runs/supervised

--rows have candidates: query and documents, or query, document and negative, or query, pos and neg.
--scores come with texts (query, documents, scores), or with ids: query_id, document_ids, scores, or
query_id, document_id, score.
"""

from absl import flags

from colbert_jax import cli
from colbert_jax.errors import UserError
from colbert_jax.programs.retriever import define_model_flags

TEACHER = define_model_flags("teacher", "The model that scores")
ROWS = flags.DEFINE_list("rows", [], "Files of rows with candidates for the teacher.")
SCORES = flags.DEFINE_list("scores", [], "Files of scores to import, instead of a teacher's.")
QUERIES = flags.DEFINE_string("queries", None, "Of imported ids: the queries, as BEIR has them.")
DOCUMENTS = flags.DEFINE_string("documents", None, "Of imported ids: the documents.")
OUTPUT = flags.DEFINE_string("output", None, "The file to write: .jsonl, .jsonl.gz or .parquet.")
CANDIDATES = flags.DEFINE_integer(
    "candidates",
    0,
    "Candidates of each row: its first, or best imported; 0: all.",
    lower_bound=0,
)


def main() -> None:
    """Scores, or imports."""
    from colbert_jax.programs.score import import_scores, score_with_teacher

    teacher = TEACHER()
    if bool(teacher.name) == bool(SCORES.value):
        raise UserError("Give either --teacher with --rows, or --scores: see --help.")
    if SCORES.value and ROWS.value:
        raise UserError("--rows are for a --teacher to score: leave them out, or --scores.")
    if teacher.name and (QUERIES.value or DOCUMENTS.value):
        raise UserError("--queries and --documents go with --scores: leave them out.")
    if SCORES.value:
        import_scores(SCORES.value, OUTPUT.value, QUERIES.value, DOCUMENTS.value, CANDIDATES.value)
        return
    if not ROWS.value:
        raise UserError("--rows is missing: name the files whose candidates are to be scored.")
    score_with_teacher(teacher, ROWS.value, OUTPUT.value, CANDIDATES.value)


if __name__ == "__main__":
    cli.run_program(main, required=["output"])
