"""XLA's flags by platform: what is set that is not XLA's default, and what for.

XLA reads `XLA_FLAGS`, and its compiler for TPUs `LIBTPU_INIT_ARGS`, when the first device is
touched; both end the process over a flag that they do not know. So `set_flags` comes before that,
and sets nothing with a jaxlib for which the table was not checked. A flag enters the table with a
source or a figure, and leaves it when its value has become the default.
"""

import dataclasses
import glob
import importlib.metadata
import importlib.util
import logging
import os
import re
from collections.abc import Sequence

logger = logging.getLogger(__name__)

# jaxlib's versions that know all flags below, and have other defaults; each brings its own libtpu.
CHECKED_JAXLIB = "0.10."


@dataclasses.dataclass(frozen=True)
class Flag:
    """One flag.

    Attributes:
      name: as XLA has it, without dashes.
      value: as it stands behind `=`.
      reason: what it does to a step.
      source: who recommends it, and what it was seen to change.
    """

    name: str
    value: str
    reason: str
    source: str

    def __str__(self) -> str:
        return f"--{self.name}={self.value}"


# docs/performance.md says which others were tried.
FLAGS: dict[str, tuple[Flag, ...]] = {
    "cpu": (
        Flag(
            "xla_cpu_experimental_ynn_fusion_type",
            "",
            "Products and sums stay XLA's own. A program with thousands of calls of YNNPACK, its "
            "default, is slow to load from the cache: it looks for each among all instructions.",
            "configs/pretrain.py's step from the cache: 4.0 s instead of 12.6 (jaxlib 0.10.2, two "
            "shared cores). A step of benchmarks/step.py: 7.3 and 7.5 s without, 7.7 and 7.7 with.",
        ),
    ),
    "cuda": (
        Flag(
            "xla_gpu_enable_latency_hiding_scheduler",
            "true",
            "GPUs compute while they send. On Hopper and Blackwell XLA does so by itself.",
            "NVIDIA sets it in its images (docs.nvidia.com/jax-toolbox/environment-variables). "
            "configs/pretrain.py with model.lengths=1, compiled for 8 A100s by jaxlib 0.10.2: of "
            "18 collectives 18 overlap computation, 0 without it; 8.28 GiB either way. Not timed.",
        ),
    ),
    "tpu": (),
}

# Where XLA reads each platform's flags.
VARIABLES = {"cpu": "XLA_FLAGS", "cuda": "XLA_FLAGS", "tpu": "LIBTPU_INIT_ARGS"}


def set_flags(platform: str) -> None:
    """Puts a platform's flags into this process's environment, before a device is touched.

    What the user has set stays. Worker processes inherit the environment.

    Args:
      platform: as `find_platform` names it; one that is not in the table has no flags.
    """
    flags = FLAGS.get(platform, ())
    version = importlib.metadata.version("jaxlib")
    if not flags or not version.startswith(CHECKED_JAXLIB):
        return
    variable = VARIABLES[platform]
    os.environ[variable] = merge(os.environ.get(variable, ""), flags)
    logger.debug("%s is now %s", variable, os.environ[variable])


def merge(own: str, flags: Sequence[Flag]) -> str:
    """The user's flags, and those of ours that he has not set.

    Args:
      own: what the variable holds: `--xla_x=true`, `--xla_x`, `--noxla_x` and the like; or, without
        a dash in front, the name of a file of flags, as XLA takes it.
      flags: ours.

    Returns:
      `own` as it is, followed by ours; where it names a file, `own` alone.
    """
    if own.strip() and not own.lstrip().startswith("-"):
        return own
    known = set(re.findall(r"(?:^|\s)--?(?:no)?(xla_\w+)", own))
    added = [str(flag) for flag in flags if flag.name not in known]
    return " ".join([own, *added] if own.strip() else added)


def find_platform() -> str:
    """The platform that JAX is going to choose, found without touching a device.

    It is the first that `JAX_PLATFORMS` names. Where it names none, it is what a package is
    installed for. That for TPUs is also on computers that compile for them and have none, so that
    a TPU's device file has to be there too.

    Returns:
      "cuda", "tpu" or "cpu", or another that `JAX_PLATFORMS` names.
    """
    first = os.environ.get("JAX_PLATFORMS", "").split(",")[0].strip()
    if first not in ("", "gpu"):
        return first
    if any(importlib.util.find_spec(f"jax_cuda{major}_plugin") for major in (12, 13)):
        return "cuda"
    chips = [*glob.glob("/dev/accel*"), *glob.glob("/dev/vfio/[0-9]*")]
    return "tpu" if chips and importlib.util.find_spec("libtpu") else "cpu"
