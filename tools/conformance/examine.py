"""Examines one model: builds it, runs all modes with transformers' cache and kvpack's, and makes its row."""

from __future__ import annotations

import copy
import functools
import time
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import kvpack
import torch
from kvpack.beside import tensor_bytes
from torch import Tensor

from . import models
from .compare import (
    EIGHT_BIT_TOLERANCE,
    HALF_FLOOR,
    HALF_RATIO,
    TOLERANCE,
    deviation,
    difference,
    distance,
    token_distance,
)
from .inputs import inputs_of
from .modes import EIGHT_BITS, EVICTION, MODES, SEVERAL_TOKENS, Mode, at_once, chunks, image, long, lookup, steps
from .subject import PROMPT, Subject, attached, forget, loaded, perturbed, reference, self_attention, tokens

Row = dict[str, Any]
EIGHT_BIT_NOISE = 0.005  # the deviation of a number's error on a grid of 255 steps over four to five deviations


def examine(model_type: str, kind: str, tell: Callable[[str], None] = lambda _: None) -> Row:
    """The row of a model: see `table.py` for what is in it.

    Args:
        model_type: as transformers names it.
        kind: of its head: see `models.KINDS`.
        tell: is told what is about to be done.
    """
    begun = time.perf_counter()
    row: Row = {"model": model_type, "kind": kind, "class": models.class_name(model_type, kind)}
    try:
        tell("building")
        model = models.build(model_type, kind)
        inputs = inputs_of(model)
    except Exception as error:
        return {**row, "verdict": "not built", "why": _told(error), "seconds": round(time.perf_counter() - begun, 1)}
    try:
        plain = steps(reference(model, inputs))
    except Exception as error:
        row.update(_without_comparison(model, error))
    else:
        row.update(_examined(model, inputs, model_type, kind, plain, tell))
    row["seconds"] = round(time.perf_counter() - begun, 1)
    return row


def _without_comparison(model: Any, error: Exception) -> Row:
    """The row of a model that does not take transformers' own cache: kvpack's is refused, or there is no telling."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            kvpack.PackedCache(model)
    except kvpack.errors.KvpackError as refused:
        return _refusal(refused)
    except Exception as same:
        error = same
    return {"verdict": "transformers raises", "why": f"with a DynamicCache: {_told(error)}"}


def _examined(
    model: Any, inputs: Row, model_type: str, kind: str, plain: list[Tensor], tell: Callable[[str], None]
) -> Row:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        expected = Expected(model, inputs, tell)
        expected.known["steps"] = plain
        row: Row = {"deviation": round(deviation(plain), 2), "ways": {}}

        def by_name() -> Subject:
            other = models.build(model_type, kind, attention="kvpack")
            other.load_state_dict(model.state_dict())
            return loaded(other, inputs)

        row["ways"]["loaded"] = _way(by_name, expected, tell, "loaded", row)
        try:
            with attached(model, inputs) as subject:
                row["ways"]["attached"] = _way(lambda: subject, expected, tell, "attached", row)
        except Exception as error:
            row["ways"]["attached"] = _refusal(error)
    row["sees"] = _sees(model, inputs, plain)
    row["nothing packed"] = any("nothing is packed" in str(w.message) for w in caught)
    row["itself"] = {mode: why for mode, why in expected.itself.items() if why}
    verdicts = [way["verdict"] for way in row["ways"].values()]
    row["verdict"] = "wrong" if "wrong" in verdicts else "refused" if verdicts[0] == "refused" else "right"
    return row


class Expected:
    """What transformers itself gives in each mode, and how much that moves when keys and values do a little."""

    def __init__(self, model: Any, inputs: Row, tell: Callable[[str], None]) -> None:
        """Of this model; nothing is run before it is asked for."""
        self.model, self.inputs, self.tell = model, inputs, tell
        self.known: dict[str, list[Tensor]] = {}
        self.itself: dict[str, str] = {}
        self.half: Any = None

    def of(self, name: str, mode: Mode) -> list[Tensor] | None:
        """What it gives in a mode; None where transformers itself raises."""
        if name not in self.known and name not in self.itself:
            self.tell(f"transformers: {name}")
            model = self.model
            if name == "bfloat16":
                self.half = self.half or copy.deepcopy(model).bfloat16()
                model = self.half
            try:
                self.known[name] = _run(mode, reference(model, self.inputs))
            except Exception as error:
                self.itself[name] = _told(error)
        return self.known.get(name)

    @functools.cached_property
    def consistent(self) -> bool:
        """Whether transformers itself says the same of a prompt in parts as of one that is whole."""
        parts, whole = (_run(mode, reference(self.model, self.inputs)) for mode in (chunks, at_once))
        return difference([torch.cat(parts, 1)], whole) <= TOLERANCE

    @functools.cached_property
    def unguessed(self) -> list[Tensor]:
        """What it generates where `lookup` guesses: guesses make it faster, and change nothing."""
        return _run(functools.partial(lookup, guesses=None), reference(self.model, self.inputs))

    def moves(self, mode: Mode, relative: float, measure: Callable[..., float], name: str) -> float:
        """By how much keys and values that differ by so much of their deviation move the outcome: most of four."""
        return max(
            measure(_run(mode, perturbed(self.model, self.inputs, relative, seed)), self.known[name])
            for seed in range(4)
        )


def _sees(model: Any, inputs: Row, plain: list[Tensor]) -> float:
    """By how much one other token early in the prompt moves the last logits, in deviations: what a mistake would."""
    forget(model)
    subject = reference(model, inputs)
    cache, ids = subject.make(), tokens(1, PROMPT + 4)
    ids[0, PROMPT - 8] = ids[0, PROMPT - 8] % 64 + 5
    moved = [subject.forward(cache, part) for part in ids.split((PROMPT, 1, 1, 1, 1), dim=1)]
    return difference(moved[-1:], plain[-1:])


def _way(make: Callable[[], Subject], expected: Expected, tell: Callable[[str], None], way: str, row: Row) -> Row:
    """What one way of using kvpack gives: its verdict, what is wrong, and what else is worth telling."""
    result: Row = {"verdict": "right", "wrong": {}, "notes": {}, "worst": 0.0}
    tell(f"{way}: made")
    try:
        subject = make()
        subject.make()
    except Exception as error:
        return _refusal(error)
    for name, mode in {**MODES, **({"image": image} if subject.picture else {})}.items():
        wanted = expected.of(name, mode)
        if wanted is None:
            continue
        tell(f"{way}: {name}")
        try:
            outcome = _run(mode, subject)
            found = difference(outcome, wanted)
        except Exception as error:
            result["wrong"][name] = _told(error)
            continue
        if found <= TOLERANCE:
            result["worst"] = max(result["worst"], found)
            continue
        moves = expected.moves(mode, 1e-6, difference, name)
        if found <= 3 * moves:
            result["notes"][name] = f"{found:.1e}: keys that differ by 1e-6 move transformers' own by {moves:.1e}"
        elif name == "prompt lookup" and difference(outcome, expected.unguessed) == 0:
            result["notes"][name] = "as without guesses; transformers' own are other tokens"
        else:
            told = f"difference {found:.1e}" if found < float("inf") else "other tokens"
            _blame(expected, result, name, told)
    tell(f"{way}: bfloat16")
    _half(subject, expected, result)
    tell(f"{way}: 8 bits")
    _eight_bits(subject, expected, result)
    tell(f"{way}: eviction")
    _eviction(subject, result)
    if way == "loaded" and "layers" not in row:
        row.update(_described(subject, expected))
    result["verdict"] = "wrong" if result["wrong"] else "right"
    return result


def _blame(expected: Expected, result: Row, name: str, told: str) -> None:
    """Calls a difference wrong, where there is a right.

    There is none where several tokens on a filled cache are another thing to transformers itself than the same tokens
    at once.
    """
    if name in SEVERAL_TOKENS and not expected.consistent:
        result["notes"][name] = f"{told}; transformers' own chunks are not its whole prompt"
    else:
        result["wrong"][name] = told


def _half(subject: Subject, expected: Expected, result: Row) -> None:
    exact, wanted = expected.known["steps"], expected.of("bfloat16", steps)
    if wanted is None:
        return
    model = copy.deepcopy(subject.model).bfloat16()
    try:
        found = token_distance(_run(steps, loaded(model, subject.inputs)), exact)
    except Exception as error:
        result["wrong"]["bfloat16"] = _told(error)
        return
    own = token_distance(wanted, exact)
    told = f"{found:.4f} from float32, transformers' own {own:.4f}"
    good = found <= HALF_RATIO * own + HALF_FLOOR
    result["notes" if good else "wrong"]["bfloat16"] = told


def _tried(subject: Subject, name: str, result: Row, **options: Any) -> list[Tensor] | None:
    """A long run with a method, which may be refused; None, and a word in the row, where there is no outcome."""
    try:
        return _run(long, subject, **options)
    except kvpack.errors.KvpackError as error:
        result["notes"][name] = f"refused: {error}"
    except Exception as error:
        result["wrong"][name] = _told(error)
    return None


def _eight_bits(subject: Subject, expected: Expected, result: Row) -> None:
    wanted = expected.of("8 bits", long)
    if wanted is None or (logits := _tried(subject, "8 bits", result, quantize=EIGHT_BITS)) is None:
        return
    found = distance(logits, wanted)
    if found <= EIGHT_BIT_TOLERANCE:
        result["notes"]["8 bits"] = f"{found:.4f}"
        return
    moves = expected.moves(long, EIGHT_BIT_NOISE, distance, "8 bits")
    told = f"{found:.4f}; as much noise moves transformers' own by {moves:.4f}"
    if found <= 1.5 * moves:
        result["notes"]["8 bits"] = told
    else:
        _blame(expected, result, "8 bits", told)


def _eviction(subject: Subject, result: Row) -> None:
    logits = _tried(subject, "eviction", result, evict=EVICTION)
    if logits is not None and not all(x.isfinite().all() for x in logits):
        result["wrong"]["eviction"] = "logits are not finite"


def _described(subject: Subject, expected: Expected) -> Row:
    """What is packed, by which path it is read, and the bytes that are held after the same tokens."""
    cache, whole = subject.make(), reference(expected.model, expected.inputs).make()
    own = self_attention(cache)
    try:
        for each, model in ((cache, subject), (whole, reference(expected.model, expected.inputs))):
            for part in (48, 1, 1, 1):
                model.forward(each, torch.full((1, part), 5))
        info = own.info()
    except Exception as error:
        return {"layers": "", "described": _told(error)}
    paths = [path for path in ("fused", "materialised") if info[path]]
    return {
        "layers": repr(own).rpartition("layers: ")[2].rstrip(")"),
        "packed": sum(type(layer).__module__.startswith("kvpack") for layer in own.layers),
        "path": "both" if len(paths) == 2 else paths[0] if paths else "none",
        "bytes": own.memory().total,
        "transformers_bytes": sum(tensor_bytes(layer) for layer in self_attention(whole).layers),
    }


def _run(mode: Mode, subject: Subject, **options: Any) -> list[Tensor]:
    """A mode, by a model that remembers nothing of the one before."""
    forget(subject.model)
    return mode(subject, **options)


def _refusal(error: Exception) -> Row:
    """A refusal, if it is one of kvpack's that says what was given and what is expected instead."""
    said = str(error)
    good = isinstance(error, kvpack.errors.KvpackError) and "given" in said and "expected" in said
    return {"verdict": "refused", "why": said} if good else {"verdict": "wrong", "wrong": {"made": _told(error)}}


def _told(error: Exception) -> str:
    """An exception in one line, with where it was raised."""
    where = traceback.extract_tb(error.__traceback__)[-1] if error.__traceback__ else None
    at = f" ({where.filename.rpartition('/')[2]}:{where.lineno})" if where else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}{at}"
