"""Retrieval tasks made in code, after RULER (Hsieh et al. 2024, arXiv 2404.06654): hidden in a text, then asked for.

Each task makes needles, a question, and the strings that a right answer contains. Texts are continued, not chatted
with: a question ends where its answer begins, so that models without a chat template can answer too.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from ..errors import OptionError

# Plain words, each known to every tokenizer.
_WORDS = (
    "apple river stone garden winter music paper window bridge candle forest silver mirror ladder castle "
    "pepper thunder violin wagon zebra basket cotton dragon engine feather hammer island jacket kitchen "
    "lemon magnet needle ocean pencil quarter ribbon saddle temple umbrella valley whistle yellow anchor "
    "button copper desert eagle flower guitar harbor insect jungle kettle lantern market napkin orange "
    "parrot rocket shadow tunnel velvet"
)
WORDS = _WORDS.split()


NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
"""What Mohtashami and Jaggi hide their pass key in, over and over."""


@dataclass(frozen=True)
class Question:
    """What is hidden in a text, and asked for.

    Attributes:
        needles: sentences to hide. The one at `asked` lies at the wanted depth, the others are spread over the text.
        question: how the text ends.
        answers: what a right answer contains; the score is the share of them that it does.
        asked: index of the needle whose depth counts; None when all are spread.
    """

    needles: tuple[str, ...]
    question: str
    answers: tuple[str, ...]
    asked: int | None = 0


@dataclass(frozen=True)
class Sample:
    """A question in its text, as token ids.

    Attributes:
        text: what is read first, and packed.
        question: what is read then.
        answers: as in `Question`.
        length: tokens that an answer may take.
    """

    text: list[int]
    question: list[int]
    answers: tuple[str, ...]
    length: int


def passkey(rng: random.Random) -> Question:
    """A number in the middle of nothing (Mohtashami and Jaggi 2023)."""
    number = _number(rng)
    needle = f"The pass key is {number}. Remember it. {number} is the pass key."
    # Ending on "the number" keeps small models from answering with the needle's last words.
    return Question((needle,), "What is the pass key? Remember: the number that is the pass key is", (number,))


def multikey(rng: random.Random, keys: int = 4) -> Question:
    """One of several numbers, each under a name of its own."""
    names, numbers = rng.sample(WORDS, keys), [_number(rng) for _ in range(keys)]
    needles = tuple(_magic(name, number) for name, number in zip(names, numbers, strict=True))
    return Question(needles, _ask_magic(names[0]), (numbers[0],))


def multivalue(rng: random.Random, values: int = 4) -> Question:
    """All of several numbers under one name."""
    name, numbers = rng.choice(WORDS), tuple(_number(rng) for _ in range(values))
    question = f"What are all the special magic numbers for {name}? The special magic numbers for {name} are"
    return Question(tuple(_magic(name, number) for number in numbers), question, numbers, None)


def variable_tracking(rng: random.Random, hops: int = 3) -> Question:
    """All variables that have a value by assignment of one to the next."""
    variables, number = [f"X{n}" for n in rng.sample(range(100, 1000), hops + 1)], _number(rng)
    chain = [f"VAR {variables[0]} = {number}."]
    chain += [f"VAR {new} = VAR {old}." for old, new in pairwise(variables)]
    question = f"Find all variables that are assigned the value {number}. They are"
    return Question(tuple(chain), question, tuple(variables), None)


def common_words(rng: random.Random, common: int = 3, times: int = 12) -> Question:
    """The words that come up most often among others that come up once in a while."""
    words = rng.sample(WORDS, len(WORDS))
    counted = words[:common] * times + words[common:] * 2
    rng.shuffle(counted)
    lists = tuple(f"Word list: {', '.join(counted[i : i + 12])}." for i in range(0, len(counted), 12))
    question = f"The {common} words that appear most often in the word lists are"
    return Question(lists, question, tuple(words[:common]), None)


TASKS: dict[str, Callable[[random.Random], Question]] = {
    "passkey": passkey,
    "multikey": multikey,
    "multivalue": multivalue,
    "variable_tracking": variable_tracking,
    "common_words": common_words,
}
"""The tasks by name."""


def has_depth(task: str) -> bool:
    """Say whether one place in the text matters for a task."""
    return TASKS[task](random.Random(0)).asked is not None


def build(task: str, tokenizer: Any, filler: str, context: int, depth: float | None, seed: str) -> Sample:
    """Return a sample whose text, question and answer together have at most `context` tokens, and nearly as many.

    Args:
        task: a name of `TASKS`.
        tokenizer: of the model.
        filler: any text; it is repeated where it is too short.
        context: tokens of all.
        depth: where the needle that is asked for lies: 0 is the beginning, 1 the end.
        seed: the same one gives the same sample.

    Raises:
        OptionError: the needles and the question alone are longer, or the filler has no words.
    """
    rng = random.Random(f"{task} {seed}")
    question = TASKS[task](rng)

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    asked = encode(f"\n\n{question.question}")
    needles = [encode(f" {needle}") for needle in question.needles]
    start = start_tokens(tokenizer)
    length = max(2 * len(encode(" " + " ".join(question.answers))), 8)
    room = context - len(asked) - sum(map(len, needles)) - len(start) - length
    if room < 0:
        raise OptionError(f"task {task!r}: {context} tokens are too few; it needs {context - room} without any filler")
    sentences = _sentences(filler, encode, room, rng)
    places = sorted(zip(_places(question, depth, rng), needles, strict=True), key=lambda place: place[0])
    text, done, total = start, 0, sum(map(len, sentences))
    for sentence in [*sentences, []]:
        while places and places[0][0] * total <= done + len(sentence) / 2:
            text += places.pop(0)[1]
        text += sentence
        done += len(sentence)
    for _, needle in places:
        text += needle
    return Sample(text, asked, question.answers, length)


def start_tokens(tokenizer: Any) -> list[int]:
    """Return the token that begins a text, for tokenizers that put one there."""
    first = tokenizer("")["input_ids"][:1]
    return list(first) if first and first[0] == tokenizer.bos_token_id else []


def score(answer: str, expected: Sequence[str]) -> float:
    """Return the share of the expected strings that `answer` contains, each as a whole word or number."""
    return sum(bool(re.search(rf"\b{re.escape(one)}\b", answer)) for one in expected) / len(expected)


def _places(question: Question, depth: float | None, rng: random.Random) -> list[float]:
    """Where each needle lies: in order when their order matters."""
    places = sorted(rng.random() for _ in question.needles)
    if question.asked is not None and depth is not None:
        rng.shuffle(places)
        places[question.asked] = depth
    return places


def _sentences(filler: str, encode: Callable[[str], list[int]], room: int, rng: random.Random) -> list[list[int]]:
    """Sentences of the filler from somewhere on, as token ids: as many as there is room for."""
    sentences = [s for s in re.split(r"(?<=[.!?])\s+", filler) if s.strip()]
    if not sentences:
        raise OptionError("filler: given a text without words, expected some for the tasks' texts")
    at = rng.randrange(len(sentences))
    taken: list[list[int]] = []
    while True:
        ids = encode(f" {sentences[at % len(sentences)].strip()}") or encode(" .")
        if len(ids) > room:
            return [*taken, ids[:room]] if room > 0 else taken
        taken.append(ids)
        room -= len(ids)
        at += 1


def _number(rng: random.Random) -> str:
    return str(rng.randrange(10_000, 100_000))


def _magic(name: str, number: str) -> str:
    return f"The special magic number for {name} is {number}."


def _ask_magic(name: str) -> str:
    return f"What is the special magic number for {name}? The special magic number for {name} is"
