"""The input road: pairs a second from prepared files on disk to arrays ready for the devices.

    python benchmarks/input.py [--pairs=65536] [--batch=4096] [--workers=0] [--threads=2]
        [--rounds=5] [--json] [--real-text=PAIRS.jsonl.gz --tokenizer=TOKENIZER.json]

The same pairs are prepared as `launch/prepare.py` does it, and read twice by the pipeline that
trains: as stored token ids (`pairs_per_second`), and as text that is tokenized on the way
(`text_pairs_per_second`). A round takes as many batches as an epoch has, shuffled over all of it;
one that is not counted goes before; figures are medians. Without --real-text, texts are made-up
words: 6 to 24 in a query, a median of 90 in a document.
"""

import argparse
import contextlib
import io
import itertools
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from harness import Parser, in_seconds, not_negative, note, positive, run_program
from transformers import PreTrainedTokenizerFast

from colbert_jax.data.corpora import file_builder
from colbert_jax.data.encode import make_encode
from colbert_jax.data.pipeline import batches_per_epoch, make_batches
from colbert_jax.data.records import Source, TextSource, TokenSource
from colbert_jax.data.tokens import TokenBuilder
from colbert_jax.errors import UserError
from colbert_jax.tokenization import ColbertTokenizer, TokenizationConfig, train_tokenizer

SPECIAL = ("unk", "cls", "sep", "pad", "mask")


def flags() -> argparse.Namespace:
    """The command line."""
    parser = Parser(__doc__, peer=False)
    parser.add_argument("--pairs", type=positive, default=65_536, help="pairs on disk, at most")
    parser.add_argument("--batch", type=positive, default=4096, help="pairs of a batch")
    parser.add_argument("--workers", type=not_negative, default=0, help="processes that read")
    parser.add_argument("--threads", type=not_negative, default=2, help="threads of each")
    parser.add_argument("--query-tokens", type=positive, default=39)
    parser.add_argument("--document-tokens", type=positive, default=187)
    parser.add_argument("--real-text", metavar="FILE", help="JSON Lines of query and document")
    parser.add_argument("--tokenizer", metavar="FILE", help="a tokenizer.json, with --real-text")
    return parser.parse()


def made_up_pairs(count: int) -> list[dict[str, str]]:
    """Pairs of words that follow Zipf's law."""
    rng = np.random.default_rng(0)
    syllables = ["".join(pair) for pair in itertools.product("bdfgklmnprst", "aeiou")]
    words = ["".join(rng.choice(syllables, rng.integers(1, 5))) for _ in range(20_000)]

    def text(length: int) -> str:
        return " ".join(words[i] for i in np.minimum(rng.zipf(1.3, length), len(words)) - 1)

    lengths = np.clip(rng.lognormal(np.log(90), 0.7, count), 5, 1000).astype(int)
    return [{"query": text(rng.integers(6, 25)), "document": text(n)} for n in lengths]


def write_pairs(args: argparse.Namespace, path: Path) -> None:
    """The pairs, as a user's file."""
    if args.real_text:
        builder = file_builder(args.real_text, path.parent / "whole")
        builder.prepare()
        source = TextSource(builder.folder)
        rows = source.__getitems__(range(min(args.pairs, len(source))))
        pairs = [{"query": row["query"], "document": row["documents"][0]} for row in rows]
    else:
        pairs = made_up_pairs(args.pairs)
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")


def open_tokenizer(args: argparse.Namespace, source: TextSource) -> ColbertTokenizer:
    """The tokenizer asked for, or one that is trained on some of the pairs."""
    if args.tokenizer:
        try:
            backend = tokenizers.Tokenizer.from_file(args.tokenizer)
        except Exception as error:  # what the library raises
            raise UserError(f"--tokenizer={args.tokenizer} cannot be read ({error}).") from error
        names = {f"{name}_token": f"[{name.upper()}]" for name in SPECIAL}
        hf_tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    else:
        some = source.__getitems__(range(min(5000, len(source))))
        texts = (text for row in some for text in (row["query"], *row["documents"]))
        hf_tokenizer = train_tokenizer(texts, 30_000)
    config = TokenizationConfig(
        query_length=args.query_tokens,
        document_length=args.document_tokens,
        query_prompt="search_query: ",
        document_prompt="search_document: ",
    )
    return ColbertTokenizer(hf_tokenizer, config)


def measure(
    name: str, source: Source, tokenizer: ColbertTokenizer, args: argparse.Namespace
) -> dict[str, Any]:
    """Seconds an epoch, and what follows from them."""
    sources = {"pairs": source}
    batches = make_batches(
        sources,
        encode=make_encode(tokenizer),
        batch_size=args.batch,
        max_documents=1,
        seed=0,
        process_index=0,
        process_count=1,
        workers=args.workers,
        threads=args.threads,
    )
    count = batches_per_epoch(sources, args.batch)
    seconds, tokens = [], 0
    try:
        for number in range(args.rounds + 1):
            began, tokens = time.perf_counter(), 0
            for _ in range(count):
                batch = next(batches)
                tokens += sum(int(batch[side]["attention_mask"].sum()) for side in batch)
            if number:
                seconds.append(time.perf_counter() - began)
            note(f"{name}: round {number} of {args.rounds}")
    finally:
        batches.close()
    median = statistics.median(seconds)
    return {
        "name": name,
        "seconds": median,
        "spread": [min(seconds), max(seconds)],
        "rounds": args.rounds,
        "pairs_per_second": count * args.batch / median,
        "tokens_per_second": tokens / median,
    }


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Prepares, measures, and returns the report."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    with tempfile.TemporaryDirectory() as folder:
        pairs = Path(folder) / "pairs.jsonl"
        with contextlib.redirect_stderr(io.StringIO()):  # progress bars
            write_pairs(args, pairs)
            text = file_builder(str(pairs), Path(folder) / "prepared")
            text.prepare()
            source = TextSource(text.folder)
            tokenizer = open_tokenizer(args, source)
            tokens = TokenBuilder(source, tokenizer, "benchmark")
            tokens.prepare()
        rows = [
            measure("tokens", TokenSource(tokens.folder), tokenizer, args),
            measure("text", source, tokenizer, args),
        ]
    shape = {key: value for key, value in vars(args).items() if key not in ("json", "rounds")}
    return {
        "benchmark": "input",
        "shape": shape | {"pairs": len(source), "cores": os.cpu_count()},
        "pairs_per_second": rows[0]["pairs_per_second"],
        "tokens_per_second": rows[0]["tokens_per_second"],
        "text_pairs_per_second": rows[1]["pairs_per_second"],
        "rows": rows,
    }


def print_table(result: dict[str, Any]) -> None:
    """The report for people."""
    print(f"{'':10}{'median s':>10}{'min':>9}{'max':>9}{'pairs/s':>12}{'tokens/s':>14}")
    for row in result["rows"]:
        median, low, high = map(in_seconds, (row["seconds"], *row["spread"]))
        print(
            f"{row['name']:10}{median:>10}{low:>9}{high:>9}"
            f"{row['pairs_per_second']:12,.0f}{row['tokens_per_second']:14,.0f}"
        )


if __name__ == "__main__":
    arguments = flags()
    run_program(lambda: main(arguments), arguments.json, print_table)
