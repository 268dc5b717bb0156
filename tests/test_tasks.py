"""The retrieval tasks: what is asked for is in the text, where it should be, and answers are scored as they should."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import kvpack
import pytest
from kvpack.evaluation.tasks import TASKS, build, has_depth, score

FILLER = "The harbour was quiet that morning. A boat came in. Nobody spoke of it, although many had seen it! Why not?"

every_task = pytest.mark.parametrize("task", list(TASKS))


@every_task
@pytest.mark.parametrize("context", [700, 1501])
def test_samples_fill_the_context_and_hold_their_answers(task: str, context: int, tokenizer: Any) -> None:
    sample = build(task, tokenizer, FILLER, context, 0.5, "a")
    total = len(sample.text) + len(sample.question) + sample.length
    assert context - 8 <= total <= context
    text = tokenizer.decode(sample.text)
    assert score(text, sample.answers) == 1
    assert score(tokenizer.decode(sample.question), sample.answers) == 0
    assert sample.length >= len(tokenizer(" " + " ".join(sample.answers)).input_ids)


@every_task
def test_a_seed_gives_the_same_sample_and_another_one_another(task: str, tokenizer: Any) -> None:
    one, same, other = (build(task, tokenizer, FILLER, 700, 0.3, seed) for seed in ("a", "a", "b"))
    assert one == same
    assert one.answers != other.answers


@pytest.mark.parametrize("task", [task for task in TASKS if has_depth(task)])
@pytest.mark.parametrize("depth", [0.0, 0.25, 0.5, 0.9, 1.0])
def test_the_needle_lies_at_its_depth(task: str, depth: float, tokenizer: Any) -> None:
    for seed in "abc":
        sample = build(task, tokenizer, FILLER, 2000, depth, seed)
        text = tokenizer.decode(sample.text)
        assert text.index(sample.answers[0]) / len(text) == pytest.approx(depth, abs=0.08)


def test_variables_are_assigned_in_order(tokenizer: Any) -> None:
    sample = build("variable_tracking", tokenizer, FILLER, 900, None, "a")
    text = tokenizer.decode(sample.text)
    for old, new in pairwise(sample.answers):
        assert f"VAR {new} = VAR {old}." in text
        assert text.index(f"VAR {old} =") < text.index(f"VAR {new} =")


def test_common_words_are_the_most_common(tokenizer: Any) -> None:
    sample = build("common_words", tokenizer, FILLER, 1500, None, "a")
    listed = [s for s in tokenizer.decode(sample.text).split(".") if "Word list:" in s]
    words = " ".join(part.split("Word list:")[1] for part in listed).replace(",", " ").split()
    counts = sorted({word: words.count(word) for word in words}.items(), key=lambda item: -item[1])
    assert {word for word, _ in counts[: len(sample.answers)]} == set(sample.answers)
    assert counts[len(sample.answers) - 1][1] > 3 * counts[len(sample.answers)][1]


@pytest.mark.parametrize(
    ("answer", "expected", "share"),
    [
        ("It is 12345.", ["12345"], 1),
        ("It is 123456.", ["12345"], 0),
        ("12345, 999", ["12345", "54321"], 0.5),
        ("", ["12345"], 0),
    ],
)
def test_answers_count_as_whole_words(answer: str, expected: list[str], share: float) -> None:
    assert score(answer, expected) == share


def test_too_few_tokens_are_refused(tokenizer: Any) -> None:
    with pytest.raises(kvpack.OptionError, match=r"common_words.*needs \d+"):
        build("common_words", tokenizer, FILLER, 200, None, "a")
    with pytest.raises(kvpack.OptionError, match="filler"):
        build("passkey", tokenizer, "  ", 200, 0.5, "a")
