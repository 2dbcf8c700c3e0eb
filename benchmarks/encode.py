"""Documents a second: a corpus of real lengths to token embeddings, ours and PyLate's.

    python benchmarks/encode.py [--size=small|base] [--documents=1024] [--document-tokens=187]
        [--batch-size=64] [--dtype=float32|bfloat16] [--real-text=FILE.jsonl.gz]
        [--peer-python=PATH] [--json]

Both start from the same texts and the same folder of random weights, tokenize, sort by length,
batch, and leave in the host's memory a NumPy array for each document, of the tokens that MaxSim may
use (no padding, no punctuation), as an index takes them. In float32 these are compared before
anything is timed (with bfloat16, those of a few documents in float32). Ours encodes --batch-size
documents at a time, on one device, as launch/evaluate.py and launch/search.py do. PyLate is
measured as
  pylate_default  `model.encode(texts, is_query=False)`: 32 documents at a time
  pylate_tuned    with --peer-batch-size documents at a time; in bfloat16 on a GPU with
                  FlashAttention, where it is installed
`speed_vs_pylate` is against the faster, `memory_vs_pylate` against the smaller. "first s" is the
pass that warms up: ours compiles in it.

Lengths: log-normal around half of --document-tokens (sigma 0.7), at least 8 and cut at the full
number. --real-text takes them from texts. Words are made up, each one token, so that tokenizing
costs less than with a real vocabulary, and a text's characters tell its tokens.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from harness import (
    AGREEMENT,
    Failure,
    Parser,
    Worker,
    check_platforms,
    find_peer,
    in_seconds,
    make_row,
    measure,
    positive,
    ratios_of,
    run_program,
)
from step import SHORTEST, SIZES, mistake

PEER_BATCH = 32  # PyLate's default
CHECK_DOCUMENTS = 64


def flags() -> tuple[argparse.Namespace, str | None]:
    """The command line, and PyLate's interpreter."""
    parser = Parser(__doc__, peer=False)
    add = parser.add_argument
    add("--size", choices=SIZES, default="small", help="base is ModernBERT-base")
    for name in ("layers", "hidden", "heads", "intermediate"):
        add(f"--{name}", type=positive, help="instead of the size's own")
    add("--vocabulary", type=positive, default=50_368, help="tokens, without the two markers")
    add("--documents", type=positive, default=1024, help="documents of the corpus")
    add("--document-tokens", type=positive, default=180 + 7)
    add("--batch-size", type=positive, default=64, help="documents that ours encodes at a time")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the arithmetic")
    add("--real-text", metavar="FILE", help="JSON Lines of query and document, for their lengths")
    add("--tokenizer", metavar="FILE", help="tokenizer.json for --real-text; else one is trained")
    add("--peer-python", metavar="PATH", help="an interpreter with PyLate 1.6; else this one")
    add("--peer-batch-size", type=positive, default=128, help="documents at a time, tuned")
    # What step.py's functions read of a batch with queries.
    parser.set_defaults(query_tokens=SHORTEST, micro_batch=0)
    args = parser.parse()
    args.pairs = args.documents
    for name, value in SIZES[args.size].items():
        setattr(args, name, getattr(args, name) or value)
    if args.document_tokens < SHORTEST:
        parser.error(f"--document-tokens must be at least {SHORTEST}")
    if wrong := mistake(args):
        parser.error(wrong)
    return args, find_peer(parser, args.peer_python)


def start(
    args: argparse.Namespace, peer: str | None, folder: Path, texts: list[str]
) -> list[Worker]:
    """All contestants on a corpus; ours is the first."""
    name = f"{len(texts)}-{args.dtype}"
    corpus = folder / f"texts-{name}.json"
    corpus.write_text(json.dumps(texts), encoding="utf-8")
    common = {
        "kind": "encode",
        "folder": str(folder / "model"),
        "texts": str(corpus),
        "dtype": args.dtype,
    }
    setups: dict[str, dict[str, Any]] = {"ours": {"batch_size": args.batch_size}}
    if peer:
        setups["pylate_default"] = {"batch_size": PEER_BATCH, "flash": False}
        setups["pylate_tuned"] = {"batch_size": args.peer_batch_size, "flash": True}
    workers = []
    for who, setup in setups.items():
        own = {"output": str(folder / f"{who}-{name}.npz")}
        python, program = (sys.executable, "ours.py") if who == "ours" else (peer, "peer.py")
        workers.append(Worker(who, python, program, common | own | setup))
    return workers


def compare(workers: list[Worker]) -> None:
    """Raises `Failure` where the first pass of two contestants gave different embeddings.

    Compared are, for each document, how many token embeddings there are, and their sum.
    """
    ran = [worker for worker in workers if not worker.error]
    for worker in ran[1:]:
        names = f"{ran[0].name} and {worker.name}"
        with np.load(ran[0].setup["output"]) as ours, np.load(worker.setup["output"]) as theirs:
            counts, sums = ours["counts"], ours["sums"]
            same = counts == theirs["counts"]
            apart = np.linalg.norm(sums - theirs["sums"], axis=1)
        if not same.all():
            raise Failure(f"{names} keep other tokens of document {np.argmin(same)}.")
        alike = apart <= AGREEMENT * np.linalg.norm(sums, axis=1)
        if not alike.all():
            raise Failure(f"{names} embed document {np.argmin(alike)} differently.")


def compare_in_float32(args: argparse.Namespace, peer: str, folder: Path, texts: list[str]) -> None:
    """Compares a few documents in float32 before bfloat16 is timed."""
    exact = argparse.Namespace(**vars(args) | {"dtype": "float32"})
    workers = start(exact, peer, folder, texts[:CHECK_DOCUMENTS])
    try:
        check_platforms(workers)
        for worker in workers:
            worker.run(timed=False)
        compare(workers)
    finally:
        for worker in workers:
            worker.close()


def document_row(worker: Worker, shape: dict[str, Any], tokens: int) -> dict[str, Any]:
    """A contestant's row, with documents and real tokens a second."""
    row = make_row(worker, shape | {"pairs": shape["documents"]}) | {"shape": shape}
    if not row["seconds"]:
        return row
    row["documents_per_second"] = row.pop("pairs_per_second")
    row["tokens_per_second"] = tokens / row["seconds"]
    if "padded_tokens" in row:  # PyLate does not say what it pads to
        row["real_token_share"] = tokens / row["padded_tokens"]
    return row


def print_table(result: dict[str, Any]) -> None:
    """The report for people."""
    heads = ("median s", "min", "max", "first s", "documents/s", "tokens/s", "real", "peak MB")
    print(f"{'':16}" + "".join(f"{head:>12}" for head in heads))
    for row in result["rows"]:
        if not row["seconds"]:
            print(f"{row['name']:16}{row['error']}")
            continue
        seconds = (row["seconds"], *row["spread"], row["first_seconds"])
        share = row.get("real_token_share")
        print(
            f"{row['name']:16}"
            + "".join(f"{in_seconds(x):>12}" for x in seconds)
            + f"{row['documents_per_second']:12.1f}{row['tokens_per_second']:12,.0f}"
            + f"{'' if share is None else f'{share:.0%}':>12}"
            + f"{(row['peak_memory_bytes'] or 0) / 2**20:12,.0f}"
        )
    print()
    for name, ratio in result["ratios"].items():
        print(f"{name:28}{'not measured' if ratio is None else f'{ratio:.3f}'}")


def main(args: argparse.Namespace, peer: str | None) -> dict[str, Any]:
    """Measures, and returns the report."""
    from synthetic import prepare_documents  # takes seconds, for which a wrong flag need not wait

    names = ("documents", "document_tokens", "batch_size", "dtype")
    names += ("layers", "hidden", "heads", "intermediate", "vocabulary")
    shape = {name: getattr(args, name) for name in names}
    exact = args.dtype == "float32"
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        texts, lengths = prepare_documents(args, folder / "model")
        if peer and not exact:
            compare_in_float32(args, peer, folder, texts)
        workers = start(args, peer, folder, texts)
        try:
            check_platforms(workers)
            measure(workers, args.rounds, (lambda: compare(workers)) if exact else (lambda: None))
            rows = [document_row(worker, shape, int(lengths.sum())) for worker in workers]
        finally:
            for worker in workers:
                worker.close()
    return {
        "benchmark": "encode",
        "shape": shape,
        "real_tokens": int(lengths.sum()),
        "rows": rows,
        "ratios": ratios_of(rows),
    }


if __name__ == "__main__":
    arguments, interpreter = flags()
    run_program(lambda: main(arguments, interpreter), arguments.json, print_table)
