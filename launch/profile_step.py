"""Runs a few of a run's training steps and says where their time goes.

    python launch/profile_step.py --config=configs/X.py [--steps=5] [--workdir=DIR] [--json]

The real step on the real input, compiled as for training; nothing of a run is left behind but the
trace, which --workdir keeps.
"""

from pathlib import Path

from absl import flags
from ml_collections import config_flags

from colbert_jax import cli

CONFIG = config_flags.DEFINE_config_file("config", None, "File with a get_config().")
STEPS = flags.DEFINE_integer("steps", 5, "Steps to trace, after two that are not.")
WORKDIR = flags.DEFINE_string(
    "workdir", None, "Where traces are added; ./runs/profile/<config> by default."
)
JSON = flags.DEFINE_boolean("json", False, "Print one JSON object instead of a table.")


def main() -> None:
    """Profiles and prints."""
    # Here, because worker processes that parse text import this file too and need no JAX.
    from colbert_jax.profile_step import profile_step

    name = Path(config_flags.get_config_filename(flags.FLAGS["config"]).split(":")[0]).stem
    profile_step(CONFIG.value, STEPS.value, WORKDIR.value or f"runs/profile/{name}", JSON.value)


if __name__ == "__main__":
    cli.run_program(main, required=["config"])
