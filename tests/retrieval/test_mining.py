"""Which documents become hard negatives, against a plain definition."""

import math
import random

import pytest

from colbert_jax.retrieval.mining import choose_negatives


def test_the_best_that_are_no_answers_come_hardest_first() -> None:
    hits = [(7, 9.0), (3, 8.0), (5, 7.0), (1, 6.0), (2, 5.0)]
    assert choose_negatives(hits, {3}, 8.0, math.inf, 3) == [7, 5, 1]
    assert choose_negatives(hits, {3, 7}, 8.0, math.inf, 9) == [5, 1, 2]
    assert choose_negatives(hits, {3}, 8.0, 0.75, 9) == [1, 2]  # at most 6
    assert choose_negatives(hits, {3}, 8.0, 1.0, 9) == [5, 1, 2]
    assert choose_negatives(hits, {3}, 8.0, 1.5, 9) == [7, 5, 1, 2]
    assert choose_negatives(hits, {3}, 8.0, 0.1, 9) == []
    assert choose_negatives([], {3}, 8.0, 0.95, 9) == []


def test_a_fraction_of_a_negative_score_is_below_it() -> None:
    hits = [(1, -1.0), (2, -1.9), (3, -2.05), (4, -2.1), (5, -3.0)]
    # 0.95 of -2 as a distance: 5 % of 2 below it, not above.
    assert choose_negatives(hits, {0}, -2.0, 0.95, 9) == [4, 5]
    assert choose_negatives(hits, {0}, -2.0, math.inf, 9) == [1, 2, 3, 4, 5]
    assert choose_negatives([(1, 0.0), (2, 1e-9)], {0}, 0.0, 0.95, 9) == [1]


@pytest.mark.parametrize("seed", range(20))
def test_random_rankings_against_the_definition(seed: int) -> None:
    rng = random.Random(seed)
    places = rng.sample(range(30), 20)
    scores = sorted((rng.uniform(-2, 2) for _ in places), reverse=True)
    hits = list(zip(places, scores, strict=True))
    positives = set(rng.sample(range(30), 4))
    own, margin, count = rng.uniform(-2, 2), rng.uniform(0.5, 1.2), rng.randrange(1, 8)
    expected = []
    for place, score in hits:
        too_close = score - own > -(1 - margin) * abs(own)
        if place not in positives and not too_close:
            expected.append(place)
    assert choose_negatives(hits, positives, own, margin, count) == expected[:count]
