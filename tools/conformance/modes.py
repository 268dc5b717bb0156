"""What is done with a model: each mode gives tensors, which have to be the same with both caches."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import kvpack
import torch
from torch import Tensor
from transformers import Cache

from .subject import PROMPT, Subject, forget, tokens

PADS = 5
Mode = Callable[..., list[Tensor]]


def steps(subject: Subject, **options: Any) -> list[Tensor]:
    """A prompt and four steps of one token."""
    return after(subject, subject.make(**options), (PROMPT, 1, 1, 1, 1))


def after(subject: Subject, cache: Any, parts: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    """The logits of forwards of one row of so many tokens each."""
    ids = tokens(1, sum(parts), seed)
    return [subject.forward(cache, part) for part in ids.split(parts, dim=1)]


def _masked(subject: Subject, prompt: Tensor, parts: tuple[int, ...] = (1, 1, 1)) -> list[Tensor]:
    """A prompt with this mask, `[2, n]`, and more tokens; the logits where there is no pad."""
    cache, mask = subject.make(), prompt
    ids = tokens(2, prompt.shape[1] + sum(parts))
    outputs: list[Tensor] = []
    for part in ids.split((prompt.shape[1], *parts), dim=1):
        if outputs:
            mask = torch.cat([mask, torch.ones_like(part)], 1)
        logits = subject.forward(cache, part, mask)
        real = mask[:, -logits.shape[1] :].bool()
        outputs.append(logits[real])
    return outputs


def _pads(start: int, n: int = PROMPT) -> Tensor:
    mask = torch.ones(2, n, dtype=torch.long)
    mask[0, start : start + PADS] = 0
    return mask


def left_padded(subject: Subject) -> list[Tensor]:
    """Two rows, the first padded at its left."""
    return _masked(subject, _pads(0))


def right_padded(subject: Subject) -> list[Tensor]:
    """Two rows, the first padded at its right, and steps after that."""
    return _masked(subject, _pads(PROMPT - PADS))


def middle_padded(subject: Subject) -> list[Tensor]:
    """Two rows, with pads in the middle of the first."""
    return _masked(subject, _pads(8))


def chunks(subject: Subject) -> list[Tensor]:
    """A prompt in several parts, then a step."""
    return after(subject, subject.make(), (11, 7, 9, 1))


def at_once(subject: Subject) -> list[Tensor]:
    """The tokens of `chunks` in one forward."""
    return after(subject, subject.make(), (28,))


def padded_chunks(subject: Subject) -> list[Tensor]:
    """The same of two rows, the first padded at its left."""
    return _masked(subject, _pads(0, 11), (7, 9, 1))


def embeddings(subject: Subject) -> list[Tensor]:
    """A prompt of vectors instead of tokens."""
    cache, ids = subject.make(), tokens(1, PROMPT)
    module = subject.model.get_decoder() if subject.has_encoder else subject.model
    vectors = module.get_input_embeddings()(ids)
    first = subject.forward(cache, None, inputs_embeds=vectors)
    return [first, *(subject.forward(cache, tokens(1, 1, seed)) for seed in (1, 2))]


def positions(subject: Subject) -> list[Tensor]:
    """Positions that the caller says: from 3 on, with a gap after the prompt."""
    cache, outputs, at = subject.make(), [], 3
    for part in tokens(1, PROMPT + 6).split((PROMPT, 1, 4, 1), dim=1):
        where = torch.arange(at, at + part.shape[1])[None]
        outputs.append(subject.forward(cache, part, position_ids=where))
        at += part.shape[1] + 2
    return outputs


def last_logits(subject: Subject) -> list[Tensor]:
    """`logits_to_keep=1`."""
    cache = subject.make()
    return [
        subject.forward(cache, part, logits_to_keep=1)[:, -1:]
        for part in tokens(1, PROMPT + 6).split((PROMPT, 1, 4, 1), dim=1)
    ]


def crop(subject: Subject) -> list[Tensor]:
    """Tokens that are taken back, as speculative decoding does, and others instead."""
    cache = subject.make()
    outputs = after(subject, cache, (PROMPT,))
    records = hasattr(Cache, "activate_past_recording")  # earlier releases do not, and take crop(0) for a length
    if records:
        cache.activate_past_recording()
    for rejected in (3, 0, 1):
        outputs += [subject.forward(cache, tokens(1, 4, 10 + rejected))]
        if rejected or records:
            cache.crop(-min(rejected, cache.get_seq_length()))  # FSMT gives its cache one token a forward
    return [*outputs, subject.forward(cache, tokens(1, 1, 20))]


def copies(subject: Subject) -> list[Tensor]:
    """A cache and its copies go on with different tokens each."""
    cache = subject.make()
    outputs = after(subject, cache, (PROMPT,))
    fork = cache.fork() if hasattr(cache, "fork") else copy.deepcopy(cache)
    caches = [cache, copy.deepcopy(cache), fork]
    for step in range(3):
        outputs += [subject.forward(each, tokens(1, 1, 30 + 3 * step + i)) for i, each in enumerate(caches)]
    return outputs


def greedy(subject: Subject) -> list[Tensor]:
    """`generate`, of two rows, the first left-padded: tokens and logits."""
    mask = {"decoder_attention_mask" if subject.has_encoder else "attention_mask": _pads(0)}
    out = subject.generate(tokens(2, PROMPT), **mask, return_dict_in_generate=True, output_logits=True)
    return [torch.stack([logits.float() for logits in out.logits], 1), out.sequences]


def beams(subject: Subject) -> list[Tensor]:
    """`generate` with three beams."""
    out = subject.generate(tokens(1, PROMPT), num_beams=3, return_dict_in_generate=True, output_scores=True)
    return [out.sequences_scores.float(), out.sequences]


def lookup(subject: Subject, guesses: int | None = 3) -> list[Tensor]:
    """`generate` with guesses from the prompt, which repeats itself."""
    ids = tokens(1, 8).repeat(1, 3)
    return [subject.generate(ids, prompt_lookup_num_tokens=guesses, max_new_tokens=10)]


def turns(subject: Subject) -> list[Tensor]:
    """Two calls of `generate` with one cache."""
    cache = subject.make()
    first = subject.generate(tokens(1, PROMPT), cache, max_new_tokens=5)
    second = subject.generate(torch.cat([first, tokens(1, 6, 3)], 1), cache, max_new_tokens=5)
    return [first, second]


def image(subject: Subject) -> list[Tensor]:
    """A prompt with an image in it, a chunk and a step; and what `generate` says to it."""
    assert subject.picture is not None
    ids, inputs = subject.picture
    cache = subject.make()
    outputs = [subject.forward(cache, ids, **inputs)]
    outputs += [subject.forward(cache, tokens(1, n, seed=n)) for n in (4, 1)]
    forget(subject.model)
    return [*outputs, subject.generate(ids, **inputs)]


MODES: dict[str, Mode] = {
    "steps": steps,
    "left-padded batch": left_padded,
    "chunks": chunks,
    "padded chunks": padded_chunks,
    "greedy": greedy,
    "beams": beams,
    "prompt lookup": lookup,
    "crop": crop,
    "turns": turns,
    "copies": copies,
    "embeddings": embeddings,
    "positions": positions,
    "logits_to_keep": last_logits,
    "right padding": right_padded,
    "middle padding": middle_padded,
}

# Those in which a forward has several tokens on a filled cache.
SEVERAL_TOKENS = frozenset(
    {"chunks", "padded chunks", "prompt lookup", "crop", "turns", "positions", "logits_to_keep", "8 bits"}
)

# Long enough that tokens are packed: a prompt, steps, a chunk and a step.
LONG = (48, 1, 1, 4, 1, 1)
EIGHT_BITS = kvpack.KIVI(bits=8, group=16, window=16)
EVICTION = kvpack.SnapKV(budget=0.5)


def long(subject: Subject, **options: Any) -> list[Tensor]:
    """What reads tokens that are packed with loss, or of which some are gone."""
    return after(subject, subject.make(**options), LONG)[1:]
