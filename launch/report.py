r"""Writes a run's report, or the comparison of several, as one HTML file that opens anywhere.

    python launch/report.py --workdir=runs/quickstart
    python launch/report.py --workdir=runs/quickstart --workdir=runs/quickstart-1000 \
        --output=comparison.html

A run that is still going has one too. A run's phases, which --config.init_from names, are shown
side by side.
"""

from absl import flags

from colbert_jax import cli

WORKDIR = flags.DEFINE_multi_string("workdir", None, "A run's folder; again for each other run.")
OUTPUT = flags.DEFINE_string(
    "output", None, "The file; by default report.html in the run's folder, or ./comparison.html."
)


def main() -> None:
    """Writes the page and says where it is."""
    from colbert_jax.report import write_report

    print(f"The report: {write_report(WORKDIR.value, OUTPUT.value)}")


if __name__ == "__main__":
    cli.run_program(main, required=["workdir"])
