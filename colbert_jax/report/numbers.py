"""Numbers, durations and dates as a reader wants them."""

import datetime
import math


def usable(value: float) -> bool:
    """Whether a value can be drawn: finite, and so far from the largest that sums stay finite."""
    return math.isfinite(value) and abs(value) < 1e300


def count(value: float | None) -> str:
    """A number of things: 27,794."""
    return "" if value is None else f"{value:,.0f}" if usable(value) else str(value)


def short(value: float | None) -> str:
    """A number to three digits: 0.946, 12.3, 1,234, 2e-5."""
    if value is None:
        return ""
    if not usable(value):
        return str(value)
    if 1000 <= abs(value) < 1e9:
        return f"{value:,.0f}"
    text = f"{value:.3g}"
    mantissa, _, exponent = text.partition("e")
    return f"{mantissa}e{int(exponent)}" if exponent else text


def tick(value: float) -> str:
    """A number at an axis: 0.5, 20k, 1.5M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size <= abs(value) < 1e12:
            return f"{value / size:.6g}{letter}"
    return short(0.0 if value == 0 else value)


def percent(value: float | None) -> str:
    """A share: 46.7%, and 100% only where it is that."""
    if value is None:
        return ""
    text = f"{100 * value:.1f}".removesuffix(".0")
    return f"{text}%" if text != "100" or value == 1 else ">99.9%" if value < 1 else f"{text}%"


def measure(value: float | None) -> str:
    """A value of an evaluation: three decimals, as everywhere in this project."""
    return "" if value is None else f"{value:.3f}"


def duration(seconds: float) -> str:
    """A time in its two largest units: 2 h 13 min."""
    if not usable(seconds):
        return str(seconds)
    if seconds < 10:
        return f"{seconds:.2g} s"
    units = (("d", 86_400), ("h", 3600), ("min", 60), ("s", 1))
    left, parts = round(seconds), []
    for name, size in units:
        if left >= size:
            parts.append(f"{left // size:,} {name}")
            left %= size
        elif parts:
            break
    return " ".join(parts[:2])


def date(written: str) -> str:
    """A date of ISO 8601 to the minute; what is none stays as it is."""
    try:
        return datetime.datetime.fromisoformat(written).strftime("%Y-%m-%d %H:%M %Z").strip()
    except ValueError:
        return written
