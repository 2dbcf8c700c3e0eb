"""What a run is made of and where it ran: `<workdir>/run.json`, for its report."""

import datetime
import json
import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from colbert_jax.forms import package_version
from colbert_jax.rates import Rates
from colbert_jax.results import write_json

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "transformers", "numpy")


def note_session(
    workdir: Path, first_step: int, devices: int, peak: Rates, facts: Mapping[str, Any]
) -> None:
    """Adds this start, or going on, to the run's sessions.

    Args:
      workdir: the run's folder.
      first_step: updates made before.
      devices: how many are used.
      peak: of one device, what MFU is a share of.
      facts: what is the same in all sessions: sizes of model and data.
    """
    session = {
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "first_step": first_step,
        "command": sys.argv,
        "backend": jax.default_backend(),
        "device_kind": jax.devices()[0].device_kind,
        "devices": devices,
        "peak_flops": peak.flops,
        "peak_flops_source": peak.source,
        "processes": jax.process_count(),
        "python": platform.python_version(),
        "versions": {name: version for name in PACKAGES if (version := package_version(name))},
    }
    before = read_sessions(workdir) if first_step else []
    write_json(workdir / "run.json", {"sessions": [*before, session], **facts})


def read_sessions(workdir: Path) -> list[dict[str, Any]]:
    """The sessions noted so far; a file that cannot be read counts as none."""
    try:
        sessions = json.loads((workdir / "run.json").read_text(encoding="utf-8"))["sessions"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return sessions if isinstance(sessions, list) else []
