"""AdamW, schedule and clipping, from one config section."""

from collections.abc import Mapping
from typing import Any

import optax

from colbert_jax.errors import UserError


def build_optimizer(
    config: Mapping[str, Any], *, total_steps: int, batch_size: int
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Builds the optimiser of a phase.

    Args:
      config: `config.optimizer`: `learning_rate` (peak), `warmup_steps`, `b1`, `b2`, `eps`,
        `weight_decay`, `clip_norm` (0 for none) and `gradient_of`. The loss is a mean over
        queries; `gradient_of="sum"` multiplies its gradient by the number of queries before it
        is clipped, as PyLate's cached loss does without meaning to: nearly every step of its
        phase 1 is then scaled to norm `clip_norm`, which AdamW does not undo entirely.
      total_steps: the learning rate falls linearly to 0 at this step.
      batch_size: queries of a global batch.

    Returns:
      The transformation and the learning rate as a function of the step.

    Raises:
      UserError: `gradient_of` is neither "mean" nor "sum".
    """
    if config["gradient_of"] not in ("mean", "sum"):
        raise UserError(
            f"config.optimizer.gradient_of is {config['gradient_of']!r}: choose 'mean' or 'sum'."
        )
    warmup = config["warmup_steps"]
    peak = config["learning_rate"]
    schedule = optax.schedules.join_schedules(
        [
            optax.schedules.linear_schedule(0.0, peak, warmup),
            optax.schedules.linear_schedule(peak, 0.0, max(total_steps - warmup, 1)),
        ],
        [warmup],
    )
    parts = []
    if config["gradient_of"] == "sum":
        parts.append(optax.scale(float(batch_size)))
    if config["clip_norm"]:
        parts.append(optax.clip_by_global_norm(config["clip_norm"]))
    parts.append(
        optax.adamw(
            schedule,
            b1=config["b1"],
            b2=config["b2"],
            eps=config["eps"],
            weight_decay=config["weight_decay"],
        )
    )
    return optax.chain(*parts), schedule
