"""Trains a ColBERT: one phase, as its config says.

    python launch/train.py --config=configs/quickstart.py [--workdir=DIR] [--config.KEY=VALUE ...]

The same command goes on where an interrupted run in the same --workdir stopped. A run that stopped
since its numbers were not finite names a folder: --replay=FOLDER computes those steps again and
says where they go wrong; the status is then 1, or 0 if nothing does with the settings given.
"""

import sys
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from colbert_jax import cli

CONFIG = config_flags.DEFINE_config_file("config", None, "File with a get_config().")
WORKDIR = flags.DEFINE_string("workdir", None, "The run's folder; ./runs/<config> by default.")
REPLAY = flags.DEFINE_string(
    "replay", None, "Compute the steps again that stopped a run: <workdir>/not_finite/step-N."
)


def main() -> None:
    """Runs the phase, or steps of it again."""
    # Here, because worker processes that parse text import this file too and need no JAX.
    from colbert_jax.replay import STILL_WRONG_STATUS, replay
    from colbert_jax.run import run

    if REPLAY.value:
        sys.exit(0 if replay(CONFIG.value, REPLAY.value) else STILL_WRONG_STATUS)
    name = Path(config_flags.get_config_filename(flags.FLAGS["config"]).split(":")[0]).stem
    run(CONFIG.value, WORKDIR.value or f"runs/{name}")


if __name__ == "__main__":
    cli.run_program(main, required=["config"])
