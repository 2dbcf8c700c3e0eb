"""What is added to a command of README.md or docs/ so that a test can run it.

A page's own flags come first and are parsed as they stand; of two alike the later counts. This is
all that differs from what the page says, beside the stand-ins of `stand_in_programs.py` for tools
and for the hub. Standard library alone: the `python` of the tests' sandboxes reads it.
"""

import os
from collections.abc import Sequence

MOST_STEPS = 20  # a run that is shorter keeps its length

TRAINING = {
    "total_steps": 2,
    "log_every_steps": 1,
    "input.batch_size": 8,
    "input.threads": 1,
    "model.lengths": 1,
    "model.query_length": 16,
    "model.document_length": 32,
    "model.embedding_size": 16,
}
# By config; another config is one made from the quickstart's.
OF_CONFIG: dict[str, dict[str, object]] = {
    "quickstart": {
        "input.sources": "('absl',)",
        "model.vocab_size": 600,
        "model.encoder.hidden_size": 32,
        "model.encoder.intermediate_size": 32,
        "model.encoder.num_hidden_layers": 1,
        "evals.best": "nDCG@10",  # so that there is a best step, which another command exports
    },
    "pretrain": {"input.sources": "('squad','npr')"},
    "supervised": {"input.sources": "('medi_sts_flickr_sampled',)", "input.max_documents": 3},
    "distill": {"input.max_documents": 4},
}
COMPILING = {
    "init_from": "tiny-encoder",
    "input.batch_size": 512,  # two queries on each of the chips of the largest slice
    "model.micro_batch": 2,
    "model.lengths": 1,
    "model.query_length": 16,
    "model.document_length": 32,
    "model.embedding_size": 16,
}

MAXSIM = ("--rounds=1", "--pairs=8", "--query-tokens=8", "--document-tokens=12", "--dim=16")
STEP = (
    *("--rounds=1", "--layers=1", "--hidden=16", "--heads=2", "--intermediate=16"),
    *("--vocabulary=64", "--pairs=4", "--query-tokens=10", "--document-tokens=12"),
    *("--micro-batch=2", "--lengths=1", "--scan-layers=0"),
)
ENCODE = (
    *("--rounds=1", "--layers=1", "--hidden=16", "--heads=2", "--intermediate=16"),
    *("--vocabulary=64", "--documents=8", "--document-tokens=12"),
)
# What a page leaves to the reader, where it names a program and a flag alone.
LEFT_OUT = {
    "launch/export.py": {"workdir": "runs/quickstart", "output": "best-colbert"},
    "launch/prepare.py": {
        "corpus": "files",
        "source": "faq.jsonl.gz",
        "columns": "query=question,document=answer",
        "output": "data",
    },
}
# Where a script is told a name that the reader has to choose.
PLACEHOLDERS = {
    "--image=IMAGE": "--image=registry.example.org/colbert_jax:1",
    "--bucket=BUCKET": "--bucket=my-bucket",
}
# Values that no test can use: a folder of the machine's, the dots of `--tokenizer=...`.
INSTEAD = {
    "--output=/mnt/data": "--output=mounted",
    "--tokenizer=...": "--tokenizer=answerdotai/ModernBERT-base",
    # As on the page, but sixteen processes would each import everything.
    "--beam_options=--direct_num_workers=16 --direct_running_mode=multi_processing": (
        "--beam_options=--direct_num_workers=1 --direct_running_mode=multi_processing"
    ),
}


def name_of(program: str) -> str:
    """A program's name in the repository, such as launch/train.py."""
    return "/".join(program.split("/")[-2:])


def added(program: str, arguments: Sequence[str]) -> list[str]:
    """The flags that make a command small.

    Args:
      program: as `name_of` gives it; "-m" for a module.
      arguments: the command's own.
    """
    if program == "-m":
        return ["--collect-only", "tests/test_lookup.py"] if arguments == ["pytest"] else []
    flags = {flag.partition("=")[0]: flag.partition("=")[2] for flag in arguments}
    more = [INSTEAD[flag] for flag in arguments if flag in INSTEAD]
    if program in ("launch/train.py", "launch/profile_step.py"):
        more += _of_config(flags, TRAINING | OF_CONFIG.get(_config(flags), OF_CONFIG["quickstart"]))
    elif program == "launch/compile.py":
        more += [f"--config.{key}={value}" for key, value in COMPILING.items()]
    elif program == "benchmarks/maxsim.py":
        more += MAXSIM
    elif program == "benchmarks/step.py":
        more += STEP
    elif program == "benchmarks/encode.py":
        more += ENCODE
    elif program == "benchmarks/input.py":
        more += ["--rounds=1", "--pairs=200", "--batch=50"]
    elif program == "benchmarks/scaling.py":  # the rows are kept as the page has them
        more += ["--kept=kept", "--output=written"]
    elif program == "benchmarks/study.py":
        more += ["--scale=0.001", *(() if "--arms" in flags else ("--arms=a", "--seeds=0"))]
    elif program in LEFT_OUT and not {"--list", "--corpus", "--workdir"} & flags.keys():
        more += [f"--{k}={v}" for k, v in LEFT_OUT[program].items() if f"--{k}" not in flags]
    return more


def _config(flags: dict[str, str]) -> str:
    return os.path.basename(flags["--config"]).removesuffix(".py")


def _of_config(flags: dict[str, str], sizes: dict[str, object]) -> list[str]:
    """A run's sizes, but for those that the command gives."""
    steps = "--config.total_steps"
    given = flags.keys() - ({steps} if int(flags.get(steps, 0)) > MOST_STEPS else set())
    return [f"--config.{k}={v}" for k, v in sizes.items() if f"--config.{k}" not in given]
