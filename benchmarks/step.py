"""A whole training step of ModernBERT (forward, backward, update): ours and PyLate's.

    python benchmarks/step.py [--size=small|base] [--pairs=32] [--micro-batch=16]
        [--dtype=float32|bfloat16] [--real-text=FILE.jsonl.gz] [--peer-python=PATH] [--json]

All start from the same random weights and take the same batch; in float32 their losses and gradient
norms are compared before anything is timed (with bfloat16, those of a small float32 batch). PyLate
is measured with its trainer's optimizer and, as it does in training, documents padded to full
length, as
  pylate_script  CachedContrastive as ColBERT-Zero's script has it: 512 texts encoded and 512
                 queries scored at a time
  pylate_tuned   CachedContrastive with our --micro-batch and --peer-score-mini-batch; in bfloat16
                 on a GPU with FlashAttention, where it is installed
  pylate_plain   Contrastive, everything in one pass: with --micro-batch=0 only
On a GPU all take a fused MaxSim where PyLate finds one. `speed_vs_pylate` is against the fastest;
`memory_vs_naive` compares the temporary bytes of our step with those of the same step that encodes
everything at once and holds all similarities; `memory_vs_pylate` the peaks of two processes.

Lengths: queries have 8 tokens to the full number, evenly; documents are log-normal around half the
full number (sigma 0.7), at least 8 and cut at the full number. --real-text takes them from texts.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from harness import (
    Failure,
    Parser,
    Worker,
    check_agreement,
    check_platforms,
    find_peer,
    make_row,
    measure,
    not_negative,
    positive,
    ratios_of,
    run_program,
)

SCRIPT_MINI_BATCH = 512  # of ColBERT-Zero's phase 1
TEMPERATURE = 0.02
SHORTEST = 8  # tokens of a text
FEWEST_WORDS = 64  # of a vocabulary: special tokens, punctuation, and some words
CHECK_PAIRS = 16

SIZES = {
    "small": {"layers": 6, "hidden": 384, "heads": 6, "intermediate": 576},
    "base": {"layers": 22, "hidden": 768, "heads": 12, "intermediate": 1152},
}


def flags() -> tuple[argparse.Namespace, str | None]:
    """The command line, and PyLate's interpreter."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--size", choices=SIZES, default="small", help="base is ModernBERT-base")
    for name in ("layers", "hidden", "heads", "intermediate"):
        add(f"--{name}", type=positive, help="instead of the size's own")
    add("--vocabulary", type=positive, default=50_368, help="tokens, without the two markers")
    add("--pairs", type=positive, default=32, help="queries of a step, one document each")
    add("--query-tokens", type=positive, default=32 + 7)
    add("--document-tokens", type=positive, default=180 + 7)
    add("--micro-batch", type=not_negative, default=16, help="texts encoded at a time; 0: all")
    add("--lengths", type=positive, help="static lengths; by default as in configs/pretrain.py")
    add("--remat", choices=("full", "names", "none"), help="likewise")
    add("--scan-layers", type=int, choices=(0, 1), help="likewise")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the arithmetic")
    add("--real-text", metavar="FILE", help="JSON Lines of query and document, for their lengths")
    add("--tokenizer", metavar="FILE", help="tokenizer.json for --real-text; else one is trained")
    args = parser.parse()
    for name, value in SIZES[args.size].items():
        setattr(args, name, getattr(args, name) or value)
    if wrong := mistake(args):
        parser.error(wrong)
    return args, find_peer(parser, args.peer_python)


def mistake(args: argparse.Namespace) -> str:
    """What is wrong with values that do not go together, or nothing."""
    if min(args.query_tokens, args.document_tokens) < SHORTEST:
        return f"--query-tokens and --document-tokens must be at least {SHORTEST}"
    if args.micro_batch and args.pairs > args.micro_batch and args.pairs % args.micro_batch:
        return f"--micro-batch={args.micro_batch} does not divide --pairs={args.pairs}"
    if args.hidden % (2 * args.heads):
        return f"--hidden={args.hidden} does not split into {args.heads} heads of an even size"
    if args.vocabulary < FEWEST_WORDS:
        return f"--vocabulary={args.vocabulary} is too small: take at least {FEWEST_WORDS}"
    for name in ("real_text", "tokenizer"):
        path = getattr(args, name)
        if path and not Path(path).is_file():
            return f"--{name.replace('_', '-')}={path}: there is no such file"
    return ""


def start(
    args: argparse.Namespace, peer: str | None, folder: Path, batch: dict[str, np.ndarray]
) -> list[Worker]:
    """All contestants on a batch; ours is the first."""
    pairs = len(batch["query_input_ids"])
    inputs = folder / f"batch-{pairs}-{args.dtype}.npz"
    np.savez(inputs, **batch)
    common = {
        "kind": "step",
        "folder": str(folder / "model"),
        "inputs": str(inputs),
        "pairs": pairs,
        "dtype": args.dtype,
        "temperature": TEMPERATURE,
    }
    peers = [
        Worker(name, peer, "peer.py", common | setup)
        for name, setup in (peer_setups(args, pairs) if peer else {}).items()
    ]
    # PyLate's plain MaxSim lets masked tokens win with similarity 0, its fused ones never.
    plain = any(worker.facts.get("maxsim") == "torch" for worker in peers)
    own = {
        "naive": False,
        "micro_batch": args.micro_batch,
        "query_length": args.query_tokens,
        "document_length": args.document_tokens,
        "lengths": args.lengths,
        "remat": args.remat,
        "scan_layers": None if args.scan_layers is None else bool(args.scan_layers),
        "masked_similarity": 0.0 if plain else None,
    }
    return [Worker("ours", sys.executable, "ours.py", common | own), *peers]


def peer_setups(args: argparse.Namespace, pairs: int) -> dict[str, dict[str, Any]]:
    """PyLate's set-ups, as the head of this file says."""
    script, tuned = min(SCRIPT_MINI_BATCH, pairs), min(args.peer_score_mini_batch, pairs)
    setups: dict[str, dict[str, Any]] = {
        "pylate_script": {"mini_batch": script, "score_mini_batch": script, "flash": False},
        "pylate_tuned": {
            "mini_batch": min(args.micro_batch or pairs, pairs),
            "score_mini_batch": tuned,
            "flash": True,
        },
    }
    if not args.micro_batch:
        setups["pylate_plain"] = {"mini_batch": None, "score_mini_batch": tuned, "flash": True}
    return setups


def naive_row(naive: Worker, shape: dict[str, Any]) -> dict[str, Any]:
    """The memory of our step with everything at once: compiled, never run."""
    facts = naive.facts
    naive.close()
    if naive.error:
        raise Failure(f"the step with everything at once does not compile: {naive.error}.")
    return {"name": "naive", "seconds": None, "shape": shape} | facts


def compare_in_float32(
    args: argparse.Namespace, peer: str, folder: Path, batch: dict[str, np.ndarray]
) -> None:
    """Compares one float32 step of a few pairs before bfloat16 is timed."""
    few = argparse.Namespace(**vars(args) | {"dtype": "float32", "micro_batch": 0})
    workers = start(few, peer, folder, {name: x[:CHECK_PAIRS] for name, x in batch.items()})
    try:
        check_platforms(workers)
        for worker in workers:
            worker.run(timed=False)
        compare(workers)
    finally:
        for worker in workers:
            worker.close()


def compare(workers: list[Worker]) -> None:
    """Raises `Failure` where losses or gradient norms differ."""
    check_agreement(workers, "loss")
    check_agreement(workers, "grad_norm", bound=1e-2)


def add_yardsticks(
    row: dict[str, Any], tokens: int, padded: int, asked: dict[str, float]
) -> dict[str, Any]:
    """Adds what a row makes of the same work.

    Tokens a second, of real ones, and their share of what the encoder works on; FLOP/s of what the
    model's definition asks for (`colbert_jax.cost.model_flops`), and their share of what a product
    of matrices reaches on this device.
    """
    share = row.pop("real_tokens", tokens / padded)
    if row.get("seconds"):
        flops = asked["model_flops"] / row["seconds"]
        row |= {"tokens_per_second": tokens / row["seconds"], "real_token_share": share}
        row |= {"model_flops_per_second": flops, "mfu": flops / asked["matmul_flops"]}
    return row


def main(args: argparse.Namespace, peer: str | None) -> dict[str, Any]:
    """Measures, and returns the report."""
    from synthetic import prepare  # takes seconds, for which a wrong flag need not wait

    names = ("pairs", "query_tokens", "document_tokens", "micro_batch", "dtype")
    names += ("layers", "hidden", "heads", "intermediate", "vocabulary")
    shape = {name: getattr(args, name) for name in names}
    padded = args.pairs * (args.query_tokens + args.document_tokens)
    exact = args.dtype == "float32"
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        batch = prepare(args, folder / "model")
        tokens = int(sum(batch[f"{side}_attention_mask"].sum() for side in ("query", "document")))
        if peer and not exact:
            compare_in_float32(args, peer, folder, batch)
        workers = start(args, peer, folder, batch)
        everything = Worker("naive", sys.executable, "ours.py", workers[0].setup | {"naive": True})
        try:
            check_platforms(workers)
            naive = naive_row(everything, shape)
            measure(workers, args.rounds, (lambda: compare(workers)) if exact else (lambda: None))
            asked = workers[0].numbers
            rows = [add_yardsticks(make_row(w, shape), tokens, padded, asked) for w in workers]
        finally:
            for worker in workers:
                worker.close()
    temporary_bytes = rows[0]["temporary_bytes"], naive["temporary_bytes"]
    return {
        "benchmark": "step",
        "shape": shape,
        "real_tokens": tokens,
        "rows": [*rows, naive],
        "ratios": ratios_of(rows) | {"memory_vs_naive": temporary_bytes[0] / temporary_bytes[1]},
    }


if __name__ == "__main__":
    arguments, interpreter = flags()
    run_program(lambda: main(arguments, interpreter), arguments.json)
