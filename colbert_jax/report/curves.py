"""Curves over a run's steps, drawn as SVG that takes its colours from the page."""

import dataclasses
import math
from collections.abc import Callable, Sequence

from colbert_jax.report.markup import Html, cut, tag
from colbert_jax.report.numbers import count, duration, measure, percent, short, tick, usable

BUCKETS = 150  # of a curve, at most: about one for each two pixels
STYLES = 6  # of lines, in the style sheet: a colour and a dash pattern each

_WIDTH, _HEIGHT = 360, 200
_LEFT, _TOP, _BOTTOM = 48, 16, 34
_LETTER_GAP = 12  # between the letters at the ends of lines


@dataclasses.dataclass(frozen=True)
class Panel:
    """What a picture of curves shows.

    Attributes:
      title: what is drawn.
      unit: in words, or "".
      form: "number", "percent", "measure" or "seconds".
      zero: whether the axis begins at zero.
      logarithmic: whether values that differ by much get a logarithmic axis.
      steps: what the horizontal axis counts.
    """

    title: str
    unit: str = ""
    form: str = "number"
    zero: bool = False
    logarithmic: bool = False
    steps: str = "step"

    @property
    def text(self) -> Callable[[float | None], str]:
        """How its values are written."""
        forms = {"percent": percent, "measure": measure, "seconds": _seconds}
        return forms.get(self.form, short)


@dataclasses.dataclass(frozen=True)
class Line:
    """A curve.

    Attributes:
      name: of its run.
      points: where it goes, in order of the horizontal axis.
      style: which of the style sheet's lines.
      letter: what stands at its end, where there are several.
    """

    name: str
    points: Sequence[tuple[float, float]]
    style: int = 0
    letter: str = ""


@dataclasses.dataclass(frozen=True)
class Bucket:
    """Neighbouring points drawn as one: where, their mean, and how far they go.

    `mean` is None where none of them can be drawn; `unusable` counts those that cannot.
    """

    x: float
    mean: float | None
    low: float
    high: float
    unusable: int


def thin(points: Sequence[tuple[float, float]], most: int = BUCKETS) -> list[Bucket]:
    """Up to `most` buckets as wide as each other; each point its own where that many suffice."""
    if len(points) <= most:
        groups = [[point] for point in points]
    else:
        first, last = points[0][0], points[-1][0]
        by_place: dict[int, list[tuple[float, float]]] = {}
        for point in points:
            place = min(most - 1, int((point[0] - first) / (last - first) * most))
            by_place.setdefault(place, []).append(point)
        groups = list(by_place.values())
    buckets = []
    for group in groups:
        x = sum(x for x, _ in group) / len(group)
        values = [y for _, y in group if usable(y)]
        if values:
            mean, low, high = sum(values) / len(values), min(values), max(values)
            buckets.append(Bucket(x, mean, low, high, len(group) - len(values)))
        else:
            buckets.append(Bucket(x, None, math.nan, math.nan, len(group)))
    return buckets


def picture(panel: Panel, lines: Sequence[Line], references: Sequence[tuple[str, float]]) -> Html:
    """A figure: what is drawn, in words too, and the drawing.

    Args:
      panel: what it shows.
      lines: the curves; those without points are left out.
      references: values of what is not trained, as dashed lines with their names.
    """
    lines = [line for line in lines if line.points]
    thinned = [(line, thin(line.points)) for line in lines]
    references = [(name, value) for name, value in references if usable(value)]
    words = [_in_words(panel, line, several=len(lines) > 1) for line in lines]
    words += [f"{name} (dashed): {panel.text(value)}" for name, value in references]
    body = _drawing(panel, thinned, references)
    if body is None:
        body = tag("p", "Nothing here can be drawn.", class_="empty")
    unit = tag("span", f" {panel.unit}", class_="unit") if panel.unit else None
    caption = tag(
        "figcaption",
        tag("b", panel.title),
        unit,
        tag("ul", *(tag("li", tag("bdi", text)) for text in words), class_="reading"),
    )
    return tag("figure", body, caption, class_="curve")


def legend(lines: Sequence[Line]) -> Html:
    """Which letter, dash pattern and colour is which run."""
    return tag(
        "ul",
        *(
            tag(
                "li",
                tag(
                    "svg",
                    tag("path", d="M1 6H39", class_=f"line l{line.style}"),
                    viewBox="0 0 40 12",
                    aria_hidden="true",
                ),
                tag("b", line.letter),
                tag("bdi", line.name),
            )
            for line in lines
        ),
        class_="legend",
        aria_label="Lines",
    )


def _in_words(panel: Panel, line: Line, several: bool) -> str:
    """First, last and extreme values of a curve, and how many could not be drawn."""
    drawn = [(x, y) for x, y in line.points if usable(y)]
    bad = len(line.points) - len(drawn)
    said = []
    if len(drawn) == 1:
        said.append(f"only {panel.text(drawn[0][1])}, at {count(drawn[0][0])}")
    elif drawn:
        said.append(f"first {panel.text(drawn[0][1])}, last {panel.text(drawn[-1][1])}")
        for word, (x, y) in (
            ("lowest", min(drawn, key=lambda p: p[1])),
            ("highest", max(drawn, key=lambda p: p[1])),
        ):
            said.append(f"{word} {panel.text(y)} at {count(x)}")
    if bad:
        values = "1 value is" if bad == 1 else f"{bad:,} values are"
        said.append(f"{values} no number that can be drawn (× at the foot)")
    name = f"{line.letter}: " if several else ""
    return name + "; ".join([", ".join(said[:3]), *said[3:]] if drawn else said)


def _drawing(
    panel: Panel,
    lines: Sequence[tuple[Line, list[Bucket]]],
    references: Sequence[tuple[str, float]],
) -> Html | None:
    drawn = [bucket for _, buckets in lines for bucket in buckets if bucket.mean is not None]
    if not drawn:
        return None
    right = _WIDTH - (22 if len(lines) > 1 else 10)
    xs = [bucket.x for _, buckets in lines for bucket in buckets]
    steps = Axis.fit(min(xs), max(xs), _LEFT, right, tight=True)
    low = min([bucket.low for bucket in drawn] + [value for _, value in references])
    high = max([bucket.high for bucket in drawn] + [value for _, value in references])
    values = Axis.fit(
        min(low, 0.0) if panel.zero else low,
        high,
        _HEIGHT - _BOTTOM,
        _TOP,
        logarithmic=panel.logarithmic and low > 0 and 30 < high / low < 1e30,
    )
    parts = [*_grid(panel, steps, values, right)]
    places = [(steps.place(bucket.x), values.place(bucket.mean or 0)) for bucket in drawn]
    for name, value in references:
        y = values.place(value)
        parts.append(tag("path", d=f"M{_LEFT} {y:.1f}H{right}", class_="reference"))
        parts.append(_name(cut(name, 40), y, right, places))
    ends = []
    for line, buckets in lines:
        parts += _line(line, buckets, steps, values)
        last = [b for b in buckets if b.mean is not None]
        if len(lines) > 1 and last and last[-1].mean is not None:
            ends.append((values.place(last[-1].mean), steps.place(last[-1].x), line))
    for y, (_, x, line) in zip(_apart([end[0] for end in ends]), ends, strict=True):
        parts.append(
            tag(
                "text", line.letter, x=f"{x + 6:.1f}", y=f"{y + 4:.1f}",
                class_=f"letter l{line.style}",
            )
        )  # fmt: skip
    unit = f", {panel.unit}" if panel.unit else ""
    return tag(
        "svg",
        *parts,
        viewBox=f"0 0 {_WIDTH} {_HEIGHT}",
        role="img",
        aria_label=f"Curve of {panel.title}{unit}; its values are described next to it.",
    )


def _name(name: str, y: float, right: float, places: Sequence[tuple[float, float]]) -> Html:
    """The name of a horizontal line, at that end and side of it where curves are farthest."""
    width = 7 * len(name) + 6
    choices = []
    for anchor, x, start in (("start", _LEFT + 3, _LEFT), ("end", right - 3, right - width)):
        for foot in (y - 4, y + 11):
            near = [abs(b - (foot - 4)) for a, b in places if start <= a <= start + width]
            inside = _TOP - 6 < foot < _HEIGHT - _BOTTOM - 2
            choices.append((inside, min([20.0, *near]), anchor, x, foot))
    _, _, anchor, x, foot = max(choices, key=lambda choice: choice[:2])
    return tag("text", name, x=f"{x:.1f}", y=f"{foot:.1f}", text_anchor=anchor)


@dataclasses.dataclass(frozen=True)
class Axis:
    """From values to places on the page.

    Attributes:
      low: the value at its beginning.
      high: the value at its end.
      start: where it begins on the page.
      end: where it ends.
      logarithmic: whether equal distances are equal ratios.
    """

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False

    @classmethod
    def fit(
        cls,
        low: float,
        high: float,
        start: float,
        end: float,
        *,
        logarithmic: bool = False,
        tight: bool = False,
    ) -> "Axis":
        """An axis with room for values from `low` to `high`, and a little more unless `tight`."""
        if logarithmic:
            room = (high / low) ** 0.04
            return cls(low / room, high * room, start, end, True)
        if high - low <= max(abs(low), abs(high), 1e-200) * 1e-9:  # all the same
            room = abs(low) / 2 or 0.5
            return cls(low - room, high + room, start, end)
        room = 0 if tight else (high - low) * 0.04
        return cls(low if low == 0 else low - room, high + room, start, end)

    def place(self, value: float) -> float:
        """Where a value is on the page."""
        if self.logarithmic:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self, most: int) -> list[float]:
        """Round values along it."""
        if self.logarithmic:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for digits in ((1, 2, 5), (1, 3), (1,)):
                found = [d * 10.0**p for p in powers for d in digits]
                found = [value for value in found if self.low <= value <= self.high]
                if len(found) <= most:
                    break
            return found[:: -(-len(found) // most) or 1]
        rough = (self.high - self.low) / most
        power = 10.0 ** math.floor(math.log10(rough))
        size = next(size * power for size in (1, 2, 2.5, 5, 10) if size * power >= rough * 0.999)
        first, last = math.ceil(self.low / size), math.floor(self.high / size)
        return [number * size for number in range(first, last + 1)]


def _grid(panel: Panel, steps: Axis, values: Axis, right: float) -> list[Html]:
    foot = _HEIGHT - _BOTTOM
    parts = []
    for value in values.ticks(5):
        y = values.place(value)
        parts.append(tag("path", d=f"M{_LEFT} {y:.1f}H{right}", class_="grid"))
        parts.append(
            tag("text", _tick(panel, value), x=_LEFT - 6, y=f"{y + 3.5:.1f}", text_anchor="end")
        )
    parts.append(tag("path", d=f"M{_LEFT} {foot}H{right}", class_="axis"))
    for value in steps.ticks(5):
        if value != int(value):
            continue
        x = steps.place(value)
        parts.append(tag("path", d=f"M{x:.1f} {foot}v4", class_="axis"))
        parts.append(tag("text", tick(value), x=f"{x:.1f}", y=foot + 16, text_anchor="middle"))
    parts.append(tag("text", panel.steps, x=right, y=_HEIGHT - 3, text_anchor="end"))
    if values.logarithmic:
        parts.append(tag("text", "log scale", x=_LEFT - 6, y=_TOP - 7, text_anchor="end"))
    return parts


def _tick(panel: Panel, value: float) -> str:
    return f"{100 * value:.4g}%" if panel.form == "percent" else tick(value)


def _line(line: Line, buckets: list[Bucket], steps: Axis, values: Axis) -> list[Html]:
    """The parts of a curve between its gaps; a point between two gaps is marked."""
    parts, stretch = [], []
    few = len(buckets) <= 25
    for bucket in [*buckets, None]:
        if bucket is not None and bucket.mean is not None:
            stretch.append((steps.place(bucket.x), bucket.mean, bucket))
            continue
        if stretch:
            path = " ".join(f"{x:.1f} {values.place(mean):.1f}" for x, mean, _ in stretch)
            if any(b.low < b.high for _, _, b in stretch):
                upper = [f"{x:.1f} {values.place(b.high):.1f}" for x, _, b in stretch]
                lower = [f"{x:.1f} {values.place(b.low):.1f}" for x, _, b in stretch]
                band = " ".join([*upper, *reversed(lower)])
                parts.append(tag("path", d=f"M{band}Z", class_=f"band l{line.style}"))
            if len(stretch) > 1:
                parts.append(tag("path", d=f"M{path}", class_=f"line l{line.style}"))
            if few or len(stretch) == 1:
                parts += [
                    tag(
                        "circle", cx=f"{x:.1f}", cy=f"{values.place(mean):.1f}", r=2.4,
                        class_=f"point l{line.style}",
                    )
                    for x, mean, _ in stretch
                ]  # fmt: skip
        stretch = []
    foot = _HEIGHT - _BOTTOM
    parts += [
        tag("path", d=f"M{x - 3:.1f} {foot - 3}l6 6m0 -6l-6 6", class_="unusable")
        for x in (steps.place(bucket.x) for bucket in buckets if bucket.unusable)
    ]
    return parts


def _apart(places: Sequence[float]) -> list[float]:
    """The same places in the same order, moved until letters at them do not cover each other."""
    order = sorted(range(len(places)), key=lambda i: places[i])
    moved = list(places)
    floor = -math.inf
    for i in order:
        moved[i] = max(moved[i], floor + _LETTER_GAP)
        floor = moved[i]
    ceiling = float(_HEIGHT - _BOTTOM - 6)
    for i in reversed(order):
        moved[i] = min(moved[i], ceiling)
        ceiling = moved[i] - _LETTER_GAP
    return moved


def _seconds(value: float | None) -> str:
    return "" if value is None else duration(value)


def scatter(pairs: Sequence[tuple[float, float]], across: str, upwards: str, measure: str) -> Html:
    """One value of each query against another, equal ones drawn as one larger disc."""
    size, low, high = 260, 52, 246  # the axes stand off, so that discs do not cover them
    right = Axis(0, 1, low, high)
    up = Axis(0, 1, size - low, size - high)
    counts: dict[tuple[float, float], int] = {}
    for x, y in pairs:
        place = (round(x * 40) / 40, round(y * 40) / 40)
        counts[place] = counts.get(place, 0) + 1
    largest = max(5, *counts.values())
    edge = low - 18
    parts = [
        tag("path", d=f"M{low} {size - edge}H{high}", class_="axis"),
        tag("path", d=f"M{edge} {size - low}V{size - high}", class_="axis"),
        tag("path", d=f"M{low} {size - low}L{high} {size - high}", class_="reference"),
    ]  # fmt: skip
    for value in (0, 0.5, 1):
        x, y = right.place(value), up.place(value)
        parts.append(
            tag("text", f"{value:g}", x=f"{x:.0f}", y=size - edge + 14, text_anchor="middle")
        )
        parts.append(tag("text", f"{value:g}", x=edge - 5, y=f"{y + 4:.0f}", text_anchor="end"))
    for (x, y), number in sorted(counts.items(), key=lambda item: -item[1]):
        many = "1 query" if number == 1 else f"{number:,} queries"
        parts.append(
            tag(
                "circle",
                tag("title", f"{many}: {cut(across, 40)} {x:g}, {cut(upwards, 40)} {y:g}"),
                cx=f"{right.place(x):.1f}",
                cy=f"{up.place(y):.1f}",
                r=f"{max(1.5, 13 * math.sqrt(number / largest)):.1f}",
                class_="disc",
            )
        )
    middle = (low + high) / 2
    parts.append(tag("text", cut(across, 30), x=middle, y=size - 4, text_anchor="middle"))
    parts.append(
        tag(
            "text", cut(upwards, 30), text_anchor="middle",
            transform=f"translate(11 {size - middle}) rotate(-90)",
        )
    )  # fmt: skip
    return tag(
        "svg",
        *parts,
        viewBox=f"0 0 {size} {size}",
        role="img",
        class_="scatter",
        aria_label=f"{measure} of each query, {upwards} against {across}; counted next to it.",
    )
