"""Intervals: that they cover what they say, with as few documents as evaluations have, normal ones and skewed ones."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest
from kvpack.evaluation.intervals import LEAST, of_mean, of_positive_mean, student, wilson
from kvpack.evaluation.report import markdown, text
from kvpack.evaluation.summary import summarise

RUNS = 4000
Draw = Callable[[random.Random], float]


def coverage(interval: Callable, draw: Draw, mean: float, documents: int) -> float:
    """How often the interval of so many documents holds the mean that they were drawn around."""
    rng = random.Random(f"documents {documents}")
    held = 0
    for _ in range(RUNS):
        low, high = interval([draw(rng) for _ in range(documents)])
        held += low <= mean <= high
    return held / RUNS


def lognormal(deviation: float) -> tuple[Draw, float]:
    return (lambda rng: rng.lognormvariate(0, deviation)), math.exp(deviation**2 / 2)


@pytest.mark.parametrize("documents", [4, 8, 16, 32])
@pytest.mark.parametrize("interval", [of_mean, of_positive_mean])
def test_normal_documents_are_covered(interval: Callable, documents: int) -> None:
    assert 0.93 <= coverage(interval, lambda rng: rng.gauss(10, 2), 10, documents) <= 0.97


@pytest.mark.parametrize("documents", [4, 8, 16, 32])
def test_normal_documents_around_zero_are_covered(documents: int) -> None:
    assert 0.93 <= coverage(of_mean, lambda rng: rng.gauss(0, 1), 0, documents) <= 0.97


@pytest.mark.parametrize("documents", [4, 8, 16, 32])
@pytest.mark.parametrize("deviation", [0.3, 0.5, 0.8, 1.0])
def test_positive_skewed_documents_are_covered(deviation: float, documents: int) -> None:
    """KL: on this project's leaderboard the logs of documents deviate by 0.1 to 0.8."""
    assert 0.92 <= coverage(of_positive_mean, *lognormal(deviation), documents) <= 0.97


@pytest.mark.parametrize("documents", [8, 16, 32])
@pytest.mark.parametrize(("deviation", "least"), [(0.3, 0.94), (0.5, 0.93), (0.8, 0.9)])
@pytest.mark.parametrize("sign", [1, -1])
def test_skewed_documents_of_either_sign_are_covered(deviation: float, least: float, sign: int, documents: int) -> None:
    """Changes of the log-perplexity, and of agreement."""
    draw, mean = lognormal(deviation)
    assert least <= coverage(of_mean, lambda rng: sign * draw(rng), sign * mean, documents) <= 0.97


@pytest.mark.parametrize("documents", [8, 16, 32])
@pytest.mark.parametrize("interval", [of_mean, of_positive_mean])
def test_exponential_documents_are_covered(interval: Callable, documents: int) -> None:
    """Neither normal nor lognormal."""
    assert coverage(interval, lambda rng: rng.expovariate(1), 1, documents) >= 0.92


def test_an_interval_holds_its_mean_and_scales_with_the_unit() -> None:
    rng = random.Random(0)
    for n in (4, 5, 9, 40):
        documents = [rng.lognormvariate(0, 1.5) for _ in range(n)]
        for interval in (of_mean, of_positive_mean):
            low, high = interval(documents)
            assert low < sum(documents) / n < high
            assert interval([1e-9 * x for x in documents]) == pytest.approx((1e-9 * low, 1e-9 * high))
        low, high = of_mean(documents)
        assert of_mean([-x for x in documents]) == pytest.approx((-high, -low))


def test_equal_documents_have_an_interval_without_width() -> None:
    assert of_mean([0.5] * 8) == (0.5, 0.5)
    assert of_positive_mean([0.5] * 8) == pytest.approx((0.5, 0.5))
    assert of_positive_mean([0.0] * 8) == (0, 0)


def test_a_document_without_loss_has_no_logarithm() -> None:
    low, high = of_positive_mean([0.0, 1e-3, 2e-3, 1e-3])
    assert low == 0
    assert 1e-3 < high < 1e-2


def test_student_is_students() -> None:
    """Against the tables."""
    table = {1: 12.7062, 2: 4.3027, 3: 3.1824, 4: 2.7764, 7: 2.3646, 8: 2.3060, 15: 2.1314, 31: 2.0395, 100: 1.9840}
    for freedom, t in table.items():
        assert student(freedom) == pytest.approx(t, abs=5e-5)


def test_a_share_of_right_answers_has_a_width_at_its_ends() -> None:
    low, high = wilson(1, 6)
    assert low == pytest.approx(0.61, abs=0.01)
    assert high == pytest.approx(1)


def records(documents: int) -> list[dict]:
    rng = random.Random(1)
    same = {"kind": "text", "tokens": 100}
    full, own = [], []
    for i in range(documents):
        full.append(same | {"method": "full", "document": i, "nll": 300.0, "lossy": 0.0})
        more = {"kl": [0.01], "kl_sum": rng.lognormvariate(0, 0.4), "agree": 90 + i}
        own.append(same | {"method": "kivi", "document": i, "nll": 300 + rng.gauss(1, 1), "lossy": 0.5} | more)
    return [*full, *own]


@pytest.mark.parametrize("documents", [1, 2, 3, 4, 8])
def test_too_few_documents_have_no_interval_and_the_table_says_so(documents: int) -> None:
    rows = summarise(records(documents))
    enough = documents >= LEAST
    for name in ("kl", "agreement", "perplexity_change"):
        assert (f"{name}_low" in rows[1]) == (f"{name}_high" in rows[1]) == enough
    for shown in (text(rows), markdown(rows, {})):
        assert ("(too few)" in shown) == (not enough)
    assert (f"{documents} documents are too few" in markdown(rows, {})) == (not enough)
