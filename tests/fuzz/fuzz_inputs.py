"""What the property tests of this folder draw from, and how much."""

import math
import os
from typing import Any

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

# The same inputs in every run; a number here draws others, that many, for a longer search.
EXAMPLES = os.environ.get("COLBERT_JAX_FUZZ_EXAMPLES")


def bounded(examples: int) -> settings:
    """Settings that draw so many inputs, and the same ones each time."""
    return settings(
        max_examples=int(EXAMPLES or examples),
        derandomize=EXAMPLES is None,
        deadline=None,
        database=None,
        phases=[Phase.explicit, Phase.generate] if os.environ.get("TMPNS") else list(Phase),
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
    )


# Any character, halves of surrogate pairs among them.
_marks = st.one_of(
    st.characters(exclude_categories=()),
    st.characters(codec="ascii"),
    st.sampled_from("\ud800\udfff\n\r\0\u2028\x85"),
)
any_text = st.text(_marks, max_size=20)

# Numbers that fit no float, no 32 bits, no decimal digits that Python writes, or no size.
HUGE = (10**12, 2**31, 2**32, 2**63, -(2**63), 2**64, 10**30, 10**400, 1e308, -1e308, 1e39)
NO_NUMBERS = (math.nan, math.inf, -math.inf)

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.sampled_from(HUGE + NO_NUMBERS),
    st.floats(),
    st.sampled_from(["", " ", "a", "a\nb", "\0", "\u2028", "nan", "../x", "/", "[CLS]"]),
    any_text,
)


def values(leaves: int = 8) -> st.SearchStrategy[Any]:
    """Anything that JSON can say."""
    return st.recursive(
        scalars,
        lambda inner: st.one_of(
            st.lists(inner, max_size=4), st.dictionaries(any_text, inner, max_size=4)
        ),
        max_leaves=leaves,
    )


edits = st.lists(
    st.tuples(
        st.sampled_from(["flip", "put", "delete", "insert", "repeat", "cut"]),
        st.floats(0, 1),
        st.integers(0, 255),
    ),
    min_size=1,
    max_size=4,
)


def damage(data: bytes, changes: list[tuple[str, float, int]]) -> bytes:
    """Bytes after some small damages, each at a place between their begin, 0, and end, 1."""
    for kind, place, value in changes:
        at = int(place * max(0, len(data) - 1))
        if kind == "flip":
            data = (
                data[:at] + bytes([data[at] ^ (1 << value % 8)]) + data[at + 1 :] if data else b""
            )
        elif kind == "put":
            data = data[:at] + bytes([value]) + data[at + 1 :]
        elif kind == "delete":
            data = data[:at] + data[at + value :]
        elif kind == "insert":
            data = data[:at] + bytes([value]) + data[at:]
        elif kind == "repeat":
            data = data[: at + value] + data[at:]
        else:
            data = data[:at]
    return data


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths to all that a JSON value holds, but not into lists and objects that are long."""
    found = [path]
    if isinstance(value, dict) and len(value) < 50:
        for key, inner in value.items():
            found += places(inner, (*path, key))
    if isinstance(value, list) and len(value) < 50:
        for index, inner in enumerate(value):
            found += places(inner, (*path, index))
    return found


def put(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """A JSON value with another one at a path."""
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = put(copy[path[0]], path[1:], new)
    return copy
