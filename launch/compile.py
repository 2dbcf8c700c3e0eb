"""Compiles a run's training step for chips that need not be here, and says what it would cost.

    python launch/compile.py --config=configs/pretrain.py --topology=v5e:4x4 [--json]

Exit status 1 says that the step does not fit in the chips' memory; a change that makes it fit is
then looked for.
"""

import sys

from absl import flags
from ml_collections import config_flags

from colbert_jax import cli

CONFIG = config_flags.DEFINE_config_file("config", None, "File with a get_config().")
TOPOLOGY = flags.DEFINE_string(
    "topology", None, "KIND:SIZE, such as v5e:4x4 or v5p:2x2x2; or local, the devices at hand."
)
FULL_EFFORT = flags.DEFINE_boolean(
    "full_effort", False, "Let XLA for TPU optimise as hard as for training: minutes, not one."
)
JSON = flags.DEFINE_boolean("json", False, "Print one JSON object instead of a table.")


def main() -> None:
    """Compiles and prints."""
    from colbert_jax.ahead import compile_ahead

    sys.exit(compile_ahead(CONFIG.value, TOPOLOGY.value, JSON.value, FULL_EFFORT.value))


if __name__ == "__main__":
    cli.run_program(main, required=["config", "topology"])
