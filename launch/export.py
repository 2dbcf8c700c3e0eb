"""Writes a run's checkpoint as a folder that PyLate and Transformers load.

python launch/export.py --workdir=runs/quickstart --output=my-colbert
"""

from absl import flags

from colbert_jax import cli
from colbert_jax.export import export_run

WORKDIR = flags.DEFINE_string("workdir", None, "The run's folder.")
OUTPUT = flags.DEFINE_string("output", None, "The folder to make; it must not hold anything yet.")
STEP = flags.DEFINE_string("step", "latest", "latest, best or a step that the run has kept.")


def main() -> None:
    """Exports."""
    export_run(WORKDIR.value, OUTPUT.value, STEP.value)


if __name__ == "__main__":
    cli.run_program(main, required=["workdir", "output"])
