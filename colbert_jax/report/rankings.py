"""Queries that went best and worst: what was found for them, and which tokens found it."""

import base64
from collections.abc import Sequence

from colbert_jax.report import numbers
from colbert_jax.report.markup import Child, Html, cut, data_block, fold, foreign, join, table, tag
from colbert_jax.report.runs import Evaluation, Example, Ranked, Run

# Characters of a page that go to heat maps, in order of appearance: a browser opens it at once, and
# it can be sent by mail.
HEAT_MAP_BUDGET = 6_000_000
_TEXT = 4000  # characters of a text that are shown
_BEGINNING, _LINES = 280, 6  # characters and lines that are shown at once
_TOKEN = 40  # of a token
_KINDS = {"best": "Best queries", "worst": "Worst queries"}
_SYSTEMS = {"bm25": "BM25"}


def examples(run: Run) -> Html:
    """The queries of all collections with their rankings."""
    parts: list[Child] = [tag("h2", "Best and worst queries", id="queries")]
    found = [evaluation for evaluation in run.evaluations if evaluation.examples]
    if not found:
        parts.append(tag("p", "No rankings have been kept yet.", class_="empty"))
        return tag("section", *parts, aria_labelledby="queries")
    parts.append(
        tag(
            "p",
            "Open a query to see what was found for it, and “token by token” to see why: MaxSim "
            "adds up, over the tokens of the query, the largest cosine with any token of the "
            "document.",
        )
    )
    parts.append(
        tag(
            "noscript",
            tag("p", "The heat maps are drawn by a script, and this browser runs none; the tables "
                "of winning pairs hold their outlined cells."),
        )
    )  # fmt: skip
    budget = Budget(HEAT_MAP_BUDGET)
    for number, evaluation in enumerate(found, 1):
        if len(found) > 1:
            parts.append(tag("h3", foreign(evaluation.collection, 200)))
        parts += _of_collection(evaluation, f"collection-{number}", budget, len(found) > 1)
    if budget.refused:
        parts.append(
            tag(
                "p",
                f"{budget.refused:,} heat maps are left out, so that the page does not grow beyond "
                "what a browser opens at once; their winning pairs are all there.",
            )
        )
    return tag("section", *parts, aria_labelledby="queries")


class Budget:
    """Characters that may still be spent, and how often there were too few."""

    def __init__(self, characters: int):
        self.left = characters
        self.refused = 0

    def spend(self, characters: int) -> bool:
        """Takes as many, if there are."""
        if characters > self.left:
            self.refused += 1
            return False
        self.left -= characters
        return True


def _of_collection(evaluation: Evaluation, name: str, budget: Budget, deeper: bool) -> list[Child]:
    parts: list[Child] = []
    heading, below = ("h4", "h5") if deeper else ("h3", "h4")
    kinds = dict.fromkeys([*_KINDS, *(example.kind for example in evaluation.examples)])
    for kind in kinds:
        chosen = [example for example in evaluation.examples if example.kind == kind]
        if not chosen:
            continue
        title = _KINDS.get(kind, kind)
        parts.append(tag(heading, foreign(title, 100)))
        # A kind is a word of ours; the number keeps ids apart whatever it is.
        place = list(kinds).index(kind)
        word = kind if kind in _KINDS else f"kind-{place}"
        for number, example in enumerate(chosen, 1):
            one = f"{name}-{word}-{number}"
            parts.append(_example(example, evaluation.measure, one, below, budget, number == 1))
    return parts


def _example(
    example: Example, measure: str, name: str, heading: str, budget: Budget, open_: bool
) -> Html:
    values = ", ".join(
        f"{_SYSTEMS.get(system, system)} {numbers.measure(value)}"
        for system, value in example.values.items()
    )
    summary = join(
        [
            tag(heading, foreign(example.query, 1000)),
            tag("span", f"{measure}: {values}" if values else "", class_="values"),
        ]
    )
    documents = [
        _document(document, f"{name}-document-{i}", budget)
        for i, document in enumerate(example.ranking, 1)
    ]
    return fold(
        summary,
        tag("p", "query ", tag("code", foreign(example.query_id, 200)), class_="note"),
        tag("ol", *documents, class_="ranking"),
        open_=open_,
        class_="example",
        id=name,
    )


def _document(document: Ranked, name: str, budget: Budget) -> Html:
    rank = "not found" if document.rank is None else f"rank {document.rank:,}"
    score = None if document.score is None else f"score {document.score:.2f}"
    return tag(
        "li",
        tag(
            "p",
            tag("span", rank, class_="rank"),
            _relevance(document.relevance),
            tag("span", score) if score else None,
            tag("code", foreign(document.document_id, 200)),
            class_="facts",
        ),
        _text(document.text),
        _tokens(document, name, budget) if document.query_tokens else None,
    )


def _text(text: str) -> Html:
    """A text, of which a long one's beginning is shown until the reader opens it."""
    beginning = cut("\n".join(text.split("\n")[:_LINES]), _BEGINNING)
    if beginning == text:
        return foreign(text, name="p", class_="text")
    return fold(
        foreign(beginning.rstrip("…") + "…"),
        foreign(text, _TEXT, name="div"),
        class_="text",
    )


def _relevance(relevance: float | None) -> Html:
    if relevance is None:
        return tag("span", "not judged", class_="unjudged")
    if relevance <= 0:
        return tag("span", "not relevant", class_="irrelevant")
    grade = f" ({numbers.short(relevance)})" if relevance != 1 else ""
    return tag("span", f"✓ relevant{grade}", class_="relevant")


def _tokens(document: Ranked, name: str, budget: Budget) -> Html:
    """The heat map's place and data, and its outlined cells as a table."""
    rows: list[Sequence[Child]] = []
    for i, (token, winner) in enumerate(zip(document.query_tokens, document.winners, strict=True)):
        if winner is None:
            rows.append([foreign(token, _TOKEN), "none", "", ""])
        else:
            rows.append(
                [
                    foreign(token, _TOKEN),
                    foreign(document.document_tokens[winner], _TOKEN),
                    f"{winner + 1:,}",
                    f"{document.similarity(i, winner):.2f}",
                ]
            )
    similarities = base64.b64encode(document.similarities).decode()
    block = data_block(
        {
            "query": [cut(token, _TOKEN) for token in document.query_tokens],
            "document": [cut(token, _TOKEN) for token in document.document_tokens],
            "winners": document.winners,
            "similarities": similarities,
        },
        class_="heat-data",
    )
    fits = bool(similarities) and budget.spend(len(block))
    return fold(
        "token by token",
        tag("div", class_="heat") if fits else None,
        block if fits else None,
        fold(
            "winning pairs as a table",
            table(
                "The document token that wins for each token of the query",
                ["query token", "document token", "its place", "cosine"],
                rows,
                numbers=False,
            ),
            open_=not fits,
            class_="pairs",
        ),
        class_="tokens",
        id=name,
    )
