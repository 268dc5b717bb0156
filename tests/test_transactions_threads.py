"""Forwards and other threads: who looks in between, and who would change something."""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import kvpack
import pytest
import torch
from kvpack.methods import Property
from support import CODECS, codec_id, random_kv, tiny_config, tiny_model
from test_transactions import FaultError


@pytest.mark.parametrize("lives", [True, False], ids=["lives", "is-gone"])
def test_a_forward_that_was_left_by_an_exception_blocks_no_other_thread(lives: bool) -> None:
    """Neither while its thread lives nor when it is gone, and another one may have its identity."""
    model = tiny_model(tiny_config(layers=3))
    ids = torch.randint(3, 128, (1, 40))
    cache = kvpack.PackedCache(model)
    model(ids, past_key_values=cache)
    expected = model(ids[:, :1], past_key_values=cache.fork()).logits
    left, go_on = threading.Event(), threading.Event()

    def fails() -> None:
        def boom(*_: Any) -> None:
            raise FaultError

        hook = model.model.layers[1].mlp.register_forward_pre_hook(boom)
        with pytest.raises(FaultError), torch.no_grad():
            model(ids[:, :1], past_key_values=cache)
        hook.remove()
        left.set()
        if lives:
            go_on.wait(60)

    outputs: list[torch.Tensor] = []

    def goes_on() -> None:
        with torch.no_grad():
            outputs.append(model(ids[:, :1], past_key_values=cache).logits)

    thread = threading.Thread(target=fails)
    thread.start()
    assert left.wait(60)
    if not lives:
        thread.join()
    other = threading.Thread(target=goes_on)
    other.start()
    other.join()
    go_on.set()
    thread.join()
    assert len(outputs) == 1
    assert torch.equal(outputs[0], expected)


LOOKS: dict[str, Callable[[kvpack.PackedCache], Any]] = {
    "memory": lambda cache: cache.memory(),
    "repr": repr,
    "info": lambda cache: cache.info(),
    "kept": lambda cache: cache.kept(0, 0),
    "fork": lambda cache: cache.fork(),
    "deepcopy": copy.deepcopy,
    "lossy_share": lambda cache: cache.lossy_share(),
    "length": lambda cache: cache.get_seq_length(),
    "mask sizes": lambda cache: cache.get_mask_sizes(1, 0),
    "keys": lambda cache: cache.layers[0].keys,
    "packed": lambda cache: cache.layers[0].packed(0, 0),
}


@pytest.mark.parametrize("evict", [None, kvpack.H2O(budget=60, block=4)], ids=["all", "h2o"])
@pytest.mark.parametrize("codec", CODECS, ids=codec_id)
def test_who_looks_meanwhile_changes_nothing(codec: Any, evict: Any, soak: bool) -> None:
    if evict is not None and Property.CONSECUTIVE_POSITIONS in codec.needs:
        pytest.skip("no eviction with this codec")
    model = tiny_model()
    ids = torch.randint(3, 128, (1, 150))
    tokens = 200 if soak else 40
    arguments = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
    quiet = model.generate(ids, past_key_values=kvpack.PackedCache(model, quantize=codec, evict=evict), **arguments)
    for _ in range(20 if soak else 1):
        cache = kvpack.PackedCache(model, quantize=codec, evict=evict)
        with looked_at(cache) as errors:
            watched = model.generate(ids, past_key_values=cache, **arguments)
        assert not errors
        assert torch.equal(watched, quiet)


@contextmanager
def looked_at(cache: kvpack.PackedCache) -> Iterator[list[tuple[str, BaseException]]]:
    """Meanwhile another thread asks everything that can be asked, as fast as it can; what it was refused."""
    errors: list[tuple[str, BaseException]] = []
    stop = threading.Event()

    def look() -> None:
        with torch.no_grad():
            while not stop.is_set():
                for name, question in LOOKS.items():
                    empty = not cache.get_seq_length()
                    try:
                        question(cache)
                    except kvpack.ShapeError as error:
                        if not empty:
                            errors.append((name, error))
                    except BaseException as error:
                        errors.append((name, error))
                        return

    thread = threading.Thread(target=look)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # threads take turns more often
    thread.start()
    try:
        yield errors
    finally:
        stop.set()
        thread.join()
        sys.setswitchinterval(interval)


def test_changes_by_another_thread_are_refused_in_the_middle_of_a_forward() -> None:
    model = tiny_model()
    cache = kvpack.PackedCache(model)
    ids = torch.randint(3, 128, (2, 30))
    model(ids, past_key_values=cache)
    expected = model(ids[:, :1], past_key_values=cache.fork()).logits
    refused: list[str] = []
    changes: dict[str, Callable[[], Any]] = {
        "reset": cache.reset,
        "crop": lambda: cache.crop(-1),
        "reorder": lambda: cache.reorder_cache(torch.tensor([1, 0])),
        "repeat": lambda: cache.batch_repeat_interleave(2),
        "select": lambda: cache.batch_select_indices(torch.tensor([0])),
        "update": lambda: cache.update(*random_kv(2, 2, 1, 32), 0),
    }

    def intrude(*_: Any) -> None:
        def change() -> None:
            for name, do in changes.items():
                try:
                    do()
                except kvpack.ConcurrencyError:
                    refused.append(name)

        thread = threading.Thread(target=change)
        thread.start()
        thread.join()

    hook = model.model.layers[0].register_forward_hook(intrude)
    out = model(ids[:, :1], past_key_values=cache).logits
    hook.remove()
    assert refused == list(changes)
    assert torch.equal(out, expected)
