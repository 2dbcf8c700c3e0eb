"""A run's metrics: one JSON object a line, TensorBoard events, and a picture of the curves."""

import json
import math
from collections.abc import Mapping
from pathlib import Path

import jax
import matplotlib
import tensorboardX

matplotlib.use("Agg")  # a training machine has no screen
import matplotlib.pyplot as plt


class MetricLog:
    """Appends metrics to `<workdir>/metrics.jsonl` and `<workdir>/tensorboard`.

    Only the first host writes; on the others every call does nothing.
    """

    def __init__(self, workdir: str | Path, resume_step: int | None = None):
        """Opens the log and drops what was logged after `resume_step`; None drops everything.

        A run that stopped after its last checkpoint makes those steps again; each then stands in
        the log once.
        """
        self.path = Path(workdir) / "metrics.jsonl"
        self.active = jax.process_index() == 0
        if self.active:
            last = -1 if resume_step is None else resume_step
            kept = [row for row in read_metrics(workdir) if row["step"] <= last]
            partial = self.path.with_suffix(".partial")  # a kill while writing loses nothing
            partial.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
            partial.replace(self.path)
            self.board = tensorboardX.SummaryWriter(
                str(Path(workdir) / "tensorboard"), purge_step=last + 1
            )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Logs values at a step; names are like `train/loss`, `eval/<name>/nDCG@10`.

        What is not finite is left out of the JSON, which has no such numbers.
        """
        if not self.active:
            return
        row = {"step": step} | {name: v for name, v in values.items() if math.isfinite(v)}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        for name, value in values.items():
            self.board.add_scalar(name, value, step)

    def close(self) -> None:
        """Flushes TensorBoard's events."""
        if self.active:
            self.board.close()


def read_metrics(workdir: str | Path) -> list[dict]:
    """All whole lines of a run's log; a last line cut short by a kill is passed over."""
    path = Path(workdir) / "metrics.jsonl"
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def draw_curves(workdir: str | Path) -> Path | None:
    """Draws `<workdir>/curves.png` from the log: loss, in-batch accuracy, gradient norm, rate.

    Returns:
      The picture's path, or None where nothing was logged yet.
    """
    rows = read_metrics(workdir)
    panels = [
        ("train/loss", "loss (nats)"),
        ("train/accuracy", "in-batch accuracy"),
        ("train/grad_norm", "gradient norm"),
        ("train/learning_rate", "learning rate"),
    ]
    measured = sorted({k for row in rows for k in row if k.endswith("nDCG@10")})
    panels += [(name, name.removeprefix("eval/")) for name in measured]
    if not any(name in row for row in rows for name, _ in panels):
        return None
    columns = 2
    lines = -(-len(panels) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(9, 2.6 * lines), squeeze=False, layout="constrained"
    )
    for axis, (name, label) in zip(axes.flat, panels, strict=False):
        points = [(row["step"], row[name]) for row in rows if name in row]
        axis.plot(*zip(*points, strict=True), marker="." if len(points) < 20 else "", linewidth=1.2)
        axis.set(title=label, xlabel="step")
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    path = Path(workdir) / "curves.png"
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
