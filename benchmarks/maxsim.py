"""MaxSim of all pairs, forward and backward: ours, its definition, and PyLate's code.

    python benchmarks/maxsim.py [--pairs=256] [--query-tokens=32] [--document-tokens=180]
        [--peer-python=PATH] [--json]

Each runs in a process of its own, in turn with the others. PyLate is measured twice:
"pylate_script" as ColBERT-Zero's script has it (512 queries scored at a time), and "pylate_tuned"
with a smaller score_mini_batch_size; on a GPU both take a fused MaxSim where PyLate finds one.
`speed_vs_pylate` is against the faster of the two; `memory_vs_naive` compares the temporary bytes
of two compiled programs, `memory_vs_pylate` the peaks of two processes.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from harness import (
    Parser,
    Worker,
    check_agreement,
    check_platforms,
    find_peer,
    make_row,
    measure,
    positive,
    ratios_of,
    run_program,
)

SCRIPT_MINI_BATCH = 512  # of ColBERT-Zero's phase 1


def flags() -> tuple[argparse.Namespace, str | None]:
    """The command line, and PyLate's interpreter."""
    parser = Parser(__doc__)
    parser.add_argument("--pairs", type=positive, default=256, help="queries, and documents")
    parser.add_argument("--query-tokens", type=positive, default=32)
    parser.add_argument("--document-tokens", type=positive, default=180)
    parser.add_argument("--dim", type=positive, default=128, help="width of a token embedding")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    args = parser.parse()
    return args, find_peer(parser, args.peer_python)


def write_inputs(args: argparse.Namespace, path: Path) -> None:
    """Random token embeddings of length 1."""
    rng = np.random.default_rng(0)

    def unit(*shape: int) -> np.ndarray:
        x = rng.standard_normal(shape, np.float32)
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    query = unit(args.pairs, args.query_tokens, args.dim)
    np.savez(path, query=query, doc=unit(args.pairs, args.document_tokens, args.dim))


def start(args: argparse.Namespace, peer: str | None, inputs: Path) -> list[Worker]:
    """All contestants."""
    common = {"kind": "maxsim", "inputs": str(inputs), "dtype": args.dtype}
    workers = [
        Worker(name, sys.executable, "ours.py", common | {"naive": name == "naive"})
        for name in ("ours", "naive")
    ]
    if peer:
        chunks = {"pylate_script": SCRIPT_MINI_BATCH, "pylate_tuned": args.peer_score_mini_batch}
        workers += [
            Worker(name, peer, "peer.py", common | {"score_mini_batch": min(chunk, args.pairs)})
            for name, chunk in chunks.items()
        ]
    return workers


def main(args: argparse.Namespace, peer: str | None) -> dict[str, Any]:
    """Measures, and returns the report."""
    shape = {
        name: getattr(args, name)
        for name in ("pairs", "query_tokens", "document_tokens", "dim", "dtype")
    }
    bound = 1e-3 if args.dtype == "float32" else 1e-1

    with tempfile.TemporaryDirectory() as folder:
        inputs = Path(folder) / "inputs.npz"
        write_inputs(args, inputs)
        workers = start(args, peer, inputs)
        try:
            check_platforms(workers)
            measure(workers, args.rounds, lambda: check_agreement(workers, "loss", bound))
            rows = [make_row(worker, shape) for worker in workers]
        finally:
            for worker in workers:
                worker.close()
    ours, naive = (row["temporary_bytes"] for row in rows[:2])
    return {
        "benchmark": "maxsim",
        "shape": shape,
        "rows": rows,
        "ratios": ratios_of(rows) | {"memory_vs_naive": ours / naive},
    }


if __name__ == "__main__":
    arguments, interpreter = flags()
    run_program(lambda: main(arguments, interpreter), arguments.json)
