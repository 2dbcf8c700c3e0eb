"""A run's report in a real browser: it draws, answers keys, fits a telephone, and stays quiet.

A Chromium of the system is used. Where there is none these tests are skipped, but not in CI.
"""

import base64
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Locator, Page, sync_playwright
from run_folders import (
    QUERY,
    TEXTS,
    hostile_run,
    make_config,
    make_document,
    make_evaluation,
    make_example,
    write_whole_run,
)

from colbert_jax.report import write_report

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-background-networking")
DESK, TELEPHONE = {"width": 1100, "height": 800}, {"width": 360, "height": 640}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        reason = "no Chromium: install your system's package chromium"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=found, args=list(FLAGS))
        yield started
        started.close()


class Opened:
    """A page, with all that it asked for and complained of."""

    def __init__(self, browser: Browser, path: Path, **context: Any):
        self.context = browser.new_context(**{"viewport": DESK} | context)
        self.page: Page = self.context.new_page()
        self.page.set_default_timeout(20_000)
        self.asked: list[str] = []
        self.said: list[str] = []
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.said.append("a dialog"), dialog.dismiss()))
        self.address = path.as_uri()
        self.page.goto(self.address)

    def close(self) -> None:
        """Closes it, and makes sure that nothing went wrong and nothing was fetched."""
        assert self.said == []
        assert {url.partition("#")[0] for url in self.asked} == {self.address}
        self.context.close()

    def open_all(self) -> None:
        """Opens every fold, and with them every heat map."""
        self.page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true })")
        self.page.wait_for_function(
            "[...document.querySelectorAll('details.tokens .heat')].every(e => e.firstChild)"
        )


def open_first(page: Page) -> Locator:
    """Opens the first heat map by a click, as a reader would; the first query is open."""
    tokens = page.locator("details.tokens").first
    tokens.locator("summary").first.click()
    return tokens


def colour_at(canvas: Locator, row: int, column: int) -> list[int]:
    """The colour in the middle of a cell: red, green, blue."""
    return canvas.evaluate(
        """(canvas, [row, column]) => {
            const sharp = canvas.width / canvas.clientWidth;
            const at = [column, row].map((i) => Math.round((i * 18 + 9) * sharp));
            // Of a copy, since the browser complains of a canvas that is read again and again.
            const copy = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
            copy.drawImage(canvas, ...at, 1, 1, 0, 0, 1, 1);
            return [...copy.getImageData(0, 0, 1, 1).data].slice(0, 3);
        }""",
        [row, column],
    )


def test_a_heat_map_is_drawn_and_says_what_it_shows(browser: Browser, tmp_path: Path) -> None:
    document = make_document(1, 1, TEXTS[0])
    cosines = [b / 127.5 - 1 for b in base64.b64decode(document["similarities"])]
    words = len(document["document_tokens"])
    opened = Opened(browser, write_report([write_whole_run(tmp_path / "run")]))
    tokens = open_first(opened.page)
    canvas, says = tokens.locator("canvas.heat-cells"), tokens.locator(".heat-says")
    labels = tokens.locator(".heat-across bdi").all_text_contents()
    assert labels == document["document_tokens"]
    assert tokens.locator(".heat-down bdi").all_text_contents() == QUERY

    def said(row: int, column: int) -> None:
        text = re.sub("[\u2068\u2069]", "", says.inner_text()).replace("\u2212", "-")
        wins = ", the winner of its row" if document["winners"][row] == column else ""
        value = cosines[row * words + column]
        assert text == (
            f"“{QUERY[row]}” and “{labels[column]}” (token {column + 1}): {value:.2f}{wins}"
        )

    canvas.focus()
    canvas.press("ArrowDown")  # begins at the first row's winner
    said(0, document["winners"][0])
    canvas.press("Home")
    canvas.press("ArrowDown")
    said(1, 0)
    canvas.press("End")
    said(1, words - 1)
    canvas.press("ArrowRight")  # stays within
    said(1, words - 1)
    canvas.hover(position={"x": 2 * 18 + 5, "y": 3 * 18 + 5})
    said(3, 2)

    # The higher a cosine, the more blue and the less red; near nothing is near white.
    highest = max(range(len(cosines)), key=cosines.__getitem__)
    lowest = min(range(len(cosines)), key=cosines.__getitem__)
    red, _, blue = colour_at(canvas, *divmod(highest, words))
    assert blue > red + 40
    red, _, blue = colour_at(canvas, *divmod(lowest, words))
    assert red > blue + 40
    middle = min(range(len(cosines)), key=lambda i: abs(cosines[i]))
    assert min(colour_at(canvas, *divmod(middle, words))) > 220

    before = colour_at(canvas, *divmod(lowest, words))
    tokens.locator("input[type=checkbox]").check()  # the range of what is there
    assert colour_at(canvas, *divmod(lowest, words)) != before
    assert tokens.locator(".heat-key").inner_text().count(f"{max(cosines):.2f}") == 2
    opened.close()


def test_nothing_in_a_run_runs_or_is_fetched(browser: Browser, tmp_path: Path) -> None:
    opened = Opened(browser, write_report([hostile_run(tmp_path / "<script>alert(1)</script>")]))
    opened.open_all()
    assert opened.page.locator("img, iframe, object, embed, link, form").count() == 0
    assert opened.page.locator("details.tokens canvas.heat-cells").count() > 0
    assert "<img src=x onerror=alert(1)>" in opened.page.locator("main").inner_text()
    opened.close()


def test_markup_that_got_in_by_mistake_does_nothing(browser: Browser, tmp_path: Path) -> None:
    path = write_report([write_whole_run(tmp_path / "run")])
    harm = "document.title='caught'"
    inserted = (
        f'<body><script>{harm}</script><img src=x onerror="{harm}">'
        f'<a id=bait href="javascript:{harm}">x</a>'
    )
    path.write_text(path.read_text(encoding="utf-8").replace("<body>", inserted, 1), "utf-8")
    opened = Opened(browser, path)
    opened.page.locator("#bait").click()
    opened.page.wait_for_timeout(200)
    assert opened.page.title() != "caught"
    assert len(opened.said) >= 3  # the browser says that it refused


@pytest.mark.parametrize("screen", [TELEPHONE, DESK], ids=["telephone", "desk"])
def test_no_page_is_wider_than_the_screen(
    browser: Browser, tmp_path: Path, screen: dict[str, int]
) -> None:
    long = make_document(1, 1, "word " * 300, query_tokens=["x" * 60] * 32)
    wide = make_example("best", query="q" * 400, ranking=[long])
    one = write_whole_run(tmp_path / "one", evaluations=[make_evaluation(examples=[wide])])
    other = write_whole_run(tmp_path / ("o" * 120), config=make_config(init_from=str(one)))
    for path in (
        write_report([one]),
        write_report([other]),
        write_report([one, other], tmp_path / "comparison.html"),
    ):
        opened = Opened(browser, path, viewport=screen)
        opened.open_all()
        widths = "[document.documentElement.scrollWidth, document.documentElement.clientWidth]"
        scrolled, shown = opened.page.evaluate(widths)
        assert scrolled <= shown, path.name
        opened.close()


def luminance(colour: str) -> float:
    """Relative luminance of `rgb(r, g, b)`, as WCAG 2.2 defines it."""
    parts = [int(x) / 255 for x in re.findall(r"\d+", colour)[:3]]
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_stands_out_from_its_ground(
    browser: Browser, tmp_path: Path, scheme: str
) -> None:
    path = write_report([write_whole_run(tmp_path / "run")])
    opened = Opened(browser, path, color_scheme=scheme)
    opened.open_all()
    pairs = opened.page.evaluate(
        """() => {
            const ground = (e) => {
                for (; e; e = e.parentElement) {
                    const colour = getComputedStyle(e).backgroundColor;
                    if (!/, 0\\)$/.test(colour)) return colour;
                }
                return "rgb(255, 255, 255)";
            };
            return [...document.querySelectorAll("main *, header *, nav *, footer *")]
                .filter((e) => [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim()))
                .filter((e) => e.checkVisibility() && !e.matches("script, noscript"))
                .map((e) => {
                    const style = getComputedStyle(e);
                    return [e.closest("svg") ? style.fill : style.color, ground(e), e.outerHTML];
                });
        }"""
    )
    assert len(pairs) > 100
    grounds = [luminance(ground) for _, ground, _ in pairs]
    assert all((g < 0.2) == (scheme == "dark") for g in grounds)
    for text, ground, element in pairs:
        light, dark = sorted((luminance(text), luminance(ground)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, element[:200]
    opened.close()


def test_a_comparison_opens_quietly(browser: Browser, tmp_path: Path) -> None:
    runs = [write_whole_run(tmp_path / name) for name in "ab"]
    opened = Opened(browser, write_report(runs, tmp_path / "comparison.html"))
    opened.open_all()
    assert opened.page.locator("svg").count() >= 5
    for link in opened.page.locator("nav a").all():
        link.click()
        target = opened.page.locator(str(link.get_attribute("href")))
        assert target.evaluate("e => e.getBoundingClientRect().top") < DESK["height"]
    opened.close()


def test_a_page_without_scripts_still_says_what_won(browser: Browser, tmp_path: Path) -> None:
    path = write_report([write_whole_run(tmp_path / "run")])
    opened = Opened(browser, path, java_script_enabled=False)
    assert "this browser runs none" in opened.page.locator("main").inner_text()
    for name in ("token by token", "winning pairs as a table"):
        opened.page.locator("summary", has_text=name).first.click()
    rows = opened.page.locator("details.tokens").first.locator("tbody tr").all_inner_texts()
    document = make_document(1, 1, TEXTS[0])
    won = [document["document_tokens"][j] for j in document["winners"]]
    assert [row.split("\t")[:2] for row in rows] == [
        list(pair) for pair in zip(QUERY, won, strict=True)
    ]
    opened.close()
