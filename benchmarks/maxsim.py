"""MaxSim of all pairs, forward and backward: ours, its definition, and PyLate's plain path.

    python benchmarks/maxsim.py [--pairs=256] [--query_tokens=32] [--document_tokens=180] [--json]

Times are medians of alternating runs; memory is what the compiled program asks for beside its
inputs and outputs. PyLate is measured where `--pylate_python` names an interpreter that has it.
"""

import json
import statistics
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from colbert_jax.maxsim import maxsim_all_pairs, maxsim_all_pairs_reference

PAIRS = flags.DEFINE_integer("pairs", 256, "Queries, and documents.")
QUERY_TOKENS = flags.DEFINE_integer("query_tokens", 32, "Tokens of a query.")
DOCUMENT_TOKENS = flags.DEFINE_integer("document_tokens", 180, "Tokens of a document.")
DIM = flags.DEFINE_integer("dim", 128, "Width of a token embedding.")
ROUNDS = flags.DEFINE_integer("rounds", 3, "Timed runs of each.")
PYLATE = flags.DEFINE_string("pylate_python", None, "An interpreter with PyLate 1.6 installed.")
JSON = flags.DEFINE_boolean("json", False, "Print one JSON object instead of a table.")

# Answers each line on standard input with the seconds that one forward and backward pass took.
PYLATE_PROGRAM = """
import sys, time, torch
from pylate.scores import colbert_scores
pairs, s, t, d = map(int, sys.argv[1:])
torch.manual_seed(0)
def unit(*shape):
    return torch.nn.functional.normalize(torch.randn(*shape), dim=-1).requires_grad_()
query, document = unit(pairs, s, d), unit(pairs, t, d)
mask = torch.ones(pairs, t, dtype=torch.bool)
for _ in sys.stdin:
    start = time.perf_counter()
    scores = colbert_scores(query, document, documents_mask=mask)
    torch.nn.functional.cross_entropy(scores, torch.arange(pairs)).backward()
    print(time.perf_counter() - start, flush=True)
"""


def loss(score):
    """Mean cross-entropy of each query's own document, as in training."""

    def of(queries, documents, query_mask, document_mask):
        scores = score(queries, documents, query_mask, document_mask)
        return jnp.mean(jax.nn.logsumexp(scores, axis=1) - jnp.diagonal(scores))

    return of


def main(_: list[str]) -> None:
    """Measures and prints."""
    rng = np.random.default_rng(0)

    def unit(*shape: int) -> jax.Array:
        x = rng.standard_normal(shape, np.float32)
        return jnp.asarray(x / np.linalg.norm(x, axis=-1, keepdims=True))

    pairs, s, t, d = PAIRS.value, QUERY_TOKENS.value, DOCUMENT_TOKENS.value, DIM.value
    inputs = (
        unit(pairs, s, d),
        unit(pairs, t, d),
        jnp.ones((pairs, s), bool),
        jnp.ones((pairs, t), bool),
    )
    programs = {
        name: jax.jit(jax.grad(loss(score), argnums=(0, 1))).lower(*inputs).compile()
        for name, score in (("ours", maxsim_all_pairs), ("naive", maxsim_all_pairs_reference))
    }

    def timed(name: str) -> float:
        start = time.perf_counter()
        jax.block_until_ready(programs[name](*inputs))
        return time.perf_counter() - start

    seconds: dict[str, list[float]] = {"ours": [], "naive": []}
    pylate = None
    if PYLATE.value:
        pylate = subprocess.Popen(
            [PYLATE.value, "-c", PYLATE_PROGRAM, *map(str, (pairs, s, t, d))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        seconds["pylate"] = []
    for warm in range(ROUNDS.value + 1):
        for name in seconds:
            if name == "pylate":
                print(file=pylate.stdin, flush=True)
                took = float(pylate.stdout.readline())
            else:
                took = timed(name)
            if warm:
                seconds[name].append(took)
    if pylate:
        pylate.stdin.close()
        pylate.wait()

    medians = {name: statistics.median(values) for name, values in seconds.items()}
    memory = {
        name: program.memory_analysis().temp_size_in_bytes for name, program in programs.items()
    }
    result = {
        "device": jax.devices()[0].device_kind,
        "shape": {"pairs": pairs, "query_tokens": s, "document_tokens": t, "dim": d},
        "seconds": medians,
        "temporary_bytes": memory,
        "ratios": {"memory_vs_naive": memory["ours"] / memory["naive"]}
        | {
            f"speed_vs_{name}": medians[name] / medians["ours"]
            for name in medians
            if name != "ours"
        },
    }
    if JSON.value:
        print(json.dumps(result))
        return
    for name, median in medians.items():
        used = f"{memory[name] / 2**20:10,.0f} MB" if name in memory else ""
        print(f"{name:8}{median:8.2f} s{used}")
    print({name: round(ratio, 4) for name, ratio in result["ratios"].items()}, file=sys.stdout)


if __name__ == "__main__":
    app.run(main)
