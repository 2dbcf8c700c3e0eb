"""One measured process: takes its set-up and then requests on standard input, answers in JSON.

Each contestant runs in a process of its own, so that the peak of its resident memory is its own
and so that PyLate can live in another environment. Standard library only, for that reason.
"""

import contextlib
import ctypes
import json
import os
import resource
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

STATUS = Path("/proc/self/status")
CLEAR_PEAK = Path("/proc/self/clear_refs")


class Contestant(Protocol):
    """What a process measures."""

    facts: dict[str, Any]  # about the set-up, for the report

    def run(self) -> dict[str, float]:
        """One whole pass, waited for; the numbers it computed."""
        ...

    def device_peak(self) -> int | None:
        """Peak bytes of accelerator memory, None where there is no accelerator."""
        ...


def serve(build: Callable[[dict[str, Any]], Contestant]) -> None:
    """Answers requests until standard input ends.

    The first line is the set-up, answered by facts. Of the lines after it "run" is answered by the
    pass's numbers and its seconds, "mark" forgets the memory peak so far, and "memory" gives it.

    Args:
      build: makes the contestant from its set-up; everything heavy is imported already, so that
        libraries do not count as memory.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not stand between the answers
    before = resident()
    contestant: Contestant | None = None
    for line in sys.stdin:
        try:
            if contestant is None:
                contestant = build(json.loads(line))
                answer: dict[str, Any] = contestant.facts
            elif line.strip() == "run":
                start = time.perf_counter()
                numbers = contestant.run()
                answer = {"seconds": time.perf_counter() - start} | numbers
            elif line.strip() == "mark":
                forget_peak()
                answer = {}
            else:
                device = contestant.device_peak()
                answer = {"peak": resident_peak() - before if device is None else device}
        except Exception as error:
            traceback.print_exc()
            text = str(error).strip().splitlines() or [""]
            answer = {"error": f"{type(error).__name__}: {text[0][:200]}"}
        print(json.dumps(answer), file=answers, flush=True)
        if "error" in answer:
            return


def resident() -> int:
    """Bytes of memory that this process holds, after giving back what it has freed."""
    give_back()
    return _status("VmRSS") or resident_peak()


def resident_peak() -> int:
    """The most bytes of memory that this process has held since `forget_peak`, or ever."""
    unit = 1 if sys.platform == "darwin" else 1024
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def forget_peak() -> None:
    """Lets the peak begin at what is held now, where the system can (Linux)."""
    give_back()
    with contextlib.suppress(OSError):
        CLEAR_PEAK.write_text("5")


def give_back() -> None:
    """Returns freed memory to the system, so that compiling or loading does not count as held."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _status(field: str) -> int:
    with contextlib.suppress(OSError):
        for line in STATUS.read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    return 0
