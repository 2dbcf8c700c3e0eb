"""What a step costs on TPU slices: compiled ahead of time for some, foretold by shapes for more.

    python benchmarks/scaling.py [--kept=FOLDER] [--output=docs] [--curves-only]

Runs launch/compile.py for each row below, a few minutes each, and writes scaling.md with what it
printed and scaling.svg with the efficiency that a roofline foretells for more chips. No TPU is
needed, only libtpu: pip install -e '.[tpu]'. With --kept, what a row printed is kept in that folder
and taken from there the next time.
"""

import argparse
import ast
import json
import re
import runpy
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot as plt

from colbert_jax.ahead import HUB_ENCODERS, model_config
from colbert_jax.cost import CHIPS, roofline, step_traffic, step_work

ROOT = Path(__file__).resolve().parents[1]
BASE, LARGE = HUB_ENCODERS

# What is compiled: a title, a config, a topology, and overrides of the config.
ROWS: tuple[tuple[str, str, str, dict[str, Any]], ...] = (
    ("Phase 1, one v5e chip", "pretrain", "v5e:2x2", {"mesh.data": 1}),
    ("Phase 1, 4 v5e chips", "pretrain", "v5e:2x2", {}),
    ("Phase 1, 16 v5e chips", "pretrain", "v5e:4x4", {}),
    ("Phase 1, 256 v5e chips", "pretrain", "v5e:16x16", {}),
    ("Phase 1, 64 v6e chips", "pretrain", "v6e:8x8", {}),
    ("Phase 1, 64 v5p chips", "pretrain", "v5p:4x4x4", {}),
    (
        "Phase 1, 131,072 pairs, 256 v5e chips, documents in a ring",
        "pretrain",
        "v5e:16x16",
        {"input.batch_size": 131_072, "loss.exchange": "ring"},
    ),
    ("Phase 2, 4 v5e chips", "supervised", "v5e:2x2", {"init_from": BASE}),
    ("Phase 3, 4 v5e chips", "distill", "v5e:2x2", {"init_from": BASE}),
    (
        "Phase 1 with ModernBERT-large, 4 v5e chips",
        "pretrain",
        "v5e:2x2",
        {"init_from": LARGE, "model.micro_batch": 16, "mesh.data": 1, "mesh.fsdp": 4},
    ),
)

# Slices of 8 to 1,024 chips; a v5e slice has at most 256.
SLICES = {
    "v5e": ("2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    "v5p": ("2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16"),
}
CURVE_PAIRS = (16_384, 131_072)

HEAD = """# What a step costs on TPUs

Written by `python benchmarks/scaling.py`; no TPU was at hand. Each table is what
`launch/compile.py` printed: XLA has compiled the real step for these chips, so that memory and the
bytes that chips send are the program's; FLOPs are counted from shapes; times are a roofline at the
chips' peak speeds, which real programs stay below. On slices of two dimensions and more, XLA for
TPU writes a reduce-scatter as an all-reduce of which each chip keeps its part (in three dimensions
an all-gather too), and it counts as one.
"""

CURVES = """## More chips

![Predicted efficiency from 8 to 1,024 chips](scaling.svg)

Efficiency is the step time on 8 chips, times 8, over that on n chips, times n: 1 is perfect. It
comes from shapes and formulas alone (`step_work`, `step_traffic` and `roofline` of
`colbert_jax/cost.py`): handovers of a ring hide behind MaxSim as far as they can, all other
transfers are waited for, and whether a step fits in memory is not asked. Values above 1 are where
a chip's share has become small enough to keep MaxSim's winners, which saves arithmetic. A v5e slice
ends at 256 chips. The formulas' bytes beside the compiled programs' (MiB that a chip sends in a
step, formula / program):
"""


def main() -> None:
    """Compiles, draws, writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kept", type=Path, help="folder for what rows printed")
    parser.add_argument("--output", type=Path, default=ROOT / "docs", help="where to write")
    parser.add_argument("--curves-only", action="store_true", help="draw, compile nothing")
    flags = parser.parse_args()
    draw_curves(flags.output / "scaling.svg")
    if flags.curves_only:
        return
    printed = []
    for number, row in enumerate(ROWS):
        print(f"{row[0]} ({row[2]})", file=sys.stderr, flush=True)
        printed.append(kept_or_compiled(number, row[1:], flags.kept))
    sections = [
        f"## {title}\n\n`{' '.join(command_line(*row))}`\n\n```\n{text}\n```\n"
        for (title, *row), text in zip(ROWS, printed, strict=True)
    ]
    text = "\n".join([HEAD, summary(printed), *sections, CURVES, comparison(printed)])
    (flags.output / "scaling.md").write_text(text, encoding="utf-8")


def command_line(name: str, topology: str, overrides: dict[str, Any]) -> list[str]:
    """The command of a row, without the interpreter."""
    changes = [f"--config.{key}={value}" for key, value in overrides.items()]
    return [
        "launch/compile.py",
        f"--config=configs/{name}.py",
        f"--topology={topology}",
        *changes,
    ]


def kept_or_compiled(number: int, row: Sequence[Any], folder: Path | None) -> str:
    """What a row's program printed, from an earlier run where it is kept."""
    file = folder / f"row-{number}.json" if folder else None
    command = command_line(*row)
    if file and file.is_file():
        kept = json.loads(file.read_text(encoding="utf-8"))
        if kept["command"] == command:
            return kept["printed"]
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    # libtpu talks on standard error too; the program's own sentence begins with "error:".
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    if done.returncode > 1 or not done.stdout:
        sys.exit(f"{' '.join(command)} failed:\n{chr(10).join(said) or done.stderr}")
    printed = "\n".join([done.stdout.rstrip(), *said])
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"command": command, "printed": printed}), encoding="utf-8")
    return printed


def plain_config(name: str, overrides: dict[str, Any]) -> dict[str, Any]:
    """A config with overrides, as plain values."""
    config = runpy.run_path(str(ROOT / "configs" / f"{name}.py"))["get_config"]()
    config.update_from_flattened_dict(overrides)
    return json.loads(config.to_json())


def summary(printed: Sequence[str]) -> str:
    """A table of what matters most in each row."""
    columns = ("memory", "step at best", "pairs/s", "235M pairs", "compiled in")
    lines = [f"| | {' | '.join(columns)} |", f"|---{'|---' * len(columns)}|"]
    for (title, *_), text in zip(ROWS, printed, strict=True):
        cells = [re.search(rf"^{re.escape(name)}  +(.*)$", text, re.MULTILINE) for name in columns]
        lines.append(f"| {title} | {' | '.join(c.group(1) if c else '-' for c in cells)} |")
    return "\n".join(lines) + "\n"


def comparison(printed: Sequence[str]) -> str:
    """A table of what formulas and programs send."""
    lines = ["| | all-gather | reduce-scatter | all-reduce | collective-permute |"]
    lines += ["|---|---|---|---|---|"]
    for (title, name, _, overrides), text in zip(ROWS, printed, strict=True):
        sent = {
            kind: amount.replace(",", "")
            for kind, amount in re.findall(r"^([a-z-]+) sent +([\d,.]+|-)", text, re.MULTILINE)
        }
        found = re.search(r"mesh data (\d+), fsdp (\d+), tensor (\d+)", text)
        if sent.get("all-gather", "-") == "-" or found is None:
            continue
        mesh = dict(
            zip(("data", "fsdp", "tensor"), map(ast.literal_eval, found.groups()), strict=True)
        )
        config = plain_config(name, overrides)
        foretold = step_traffic(config, model_config(config), mesh)
        cells = [f"{foretold[kind] / 2**20:,.1f} / {float(sent[kind]):,.1f}" for kind in foretold]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def efficiency(kind: str, pairs: int, exchange: str) -> tuple[list[int], list[float]]:
    """Chips, and the efficiency on so many, by formulas alone."""
    config = plain_config("pretrain", {"input.batch_size": pairs, "loss.exchange": exchange})
    model, chips, times = model_config(config), [], []
    for size in SLICES[kind]:
        extents = [int(n) for n in size.split("x")]
        mesh = {"data": 1, "fsdp": 1, "tensor": 1}
        for extent in extents:
            mesh["data"] *= extent
        work = step_work(config, model, mesh, "tpu")
        sent = step_traffic(config, model, mesh)
        chips.append(mesh["data"])
        times.append(roofline(work, sent, CHIPS[kind], extents).step)
    return chips, [times[0] * chips[0] / (n * t) for n, t in zip(chips, times, strict=True)]


def draw_curves(file: Path) -> None:
    """Draws predicted efficiency over chips, a line for each kind, batch and exchange."""
    matplotlib.rcParams["svg.hashsalt"] = "scaling"  # the same drawing, the same bytes
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True)
    for panel, pairs in zip(axes, CURVE_PAIRS, strict=True):
        for kind, colour in (("v5e", "tab:blue"), ("v5p", "tab:orange")):
            for exchange, style in (("gather", "-"), ("ring", "--")):
                chips, values = efficiency(kind, pairs, exchange)
                label = f"{kind}, {exchange}"
                panel.plot(chips, values, style, color=colour, marker=".", label=label)
        panel.set_xscale("log", base=2)
        panel.set_xticks([8, 16, 32, 64, 128, 256, 512, 1024], minor=False)
        panel.set_xticklabels(["8", "16", "32", "64", "128", "256", "512", "1,024"])
        panel.set_ylim(0, 1.2)
        panel.set_title(f"{pairs:,} pairs a step", fontsize=10)
        panel.set_xlabel("chips")
        panel.grid(alpha=0.3)
    axes[0].set_ylabel("predicted efficiency")
    axes[0].legend(fontsize=8, loc="lower left")
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, metadata={"Date": None})


if __name__ == "__main__":
    main()
