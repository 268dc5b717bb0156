"""Masks of the user's own: what they show is read, what nobody sees is a pad, and a bad one changes nothing."""

from __future__ import annotations

import threading

import kvpack
import pytest
import torch
from support import tiny_model
from transformers import DynamicCache

TOKENS, NEW = 10, 3


def logits(cache_of: type, mask: torch.Tensor, chunk_mask: torch.Tensor) -> torch.Tensor:
    """Logits of a prompt under `mask` and of a chunk after it under `chunk_mask`, 4-D both."""
    packed = cache_of is kvpack.PackedCache
    model = tiny_model(attention="kvpack" if packed else "sdpa")
    cache = kvpack.PackedCache(model) if packed else DynamicCache(config=model.config)
    ids = torch.arange(3, 3 + TOKENS + NEW)[None]
    prompt = model(ids[:, :TOKENS], attention_mask=mask, past_key_values=cache).logits
    chunk = model(ids[:, TOKENS:], attention_mask=chunk_mask, past_key_values=cache).logits
    return torch.cat([prompt, chunk], dim=1)


def masks(heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal masks in which head 0 does not see token 4, and no token 5 sees itself."""
    whole = torch.ones(1, heads, TOKENS + NEW, TOKENS + NEW, dtype=torch.bool).tril()
    whole[:, 0, :, 4] = heads == 1
    whole[:, :, 5, 5] = False
    return whole[:, :, :TOKENS, :TOKENS], whole[:, :, TOKENS:]


@pytest.mark.parametrize("heads", [1, 4], ids=["all heads", "per head"])
@pytest.mark.parametrize("additive", [False, True])
def test_masks_of_the_users_own(heads: int, additive: bool) -> None:
    both = masks(heads)
    if additive:
        both = tuple(torch.where(m, 0.0, torch.finfo(torch.float32).min) for m in both)  # type: ignore[assignment]
    difference = (logits(kvpack.PackedCache, *both) - logits(DynamicCache, *both)).abs().max().item()
    assert difference < 1e-5


def test_a_mask_that_does_not_fit_changes_nothing() -> None:
    model = tiny_model()
    cache = kvpack.PackedCache(model)
    ids = torch.tensor([[5, 6, 7, 8]])
    model(ids, past_key_values=cache)
    expected = model(ids, past_key_values=cache.fork()).logits
    with pytest.raises(kvpack.ShapeError, match="attention mask"):
        model(ids, attention_mask=torch.ones(1, 1, 4, 9, dtype=torch.bool), past_key_values=cache)
    assert [layer.get_seq_length() for layer in cache.layers] == [4, 4]
    assert torch.equal(model(ids, past_key_values=cache).logits, expected)


def test_a_nan_query_is_not_hidden() -> None:
    from support import random_kv

    layer = kvpack.PackedCache(tiny_model()).layers[0]
    layer.update(*random_kv(1, 2, 20, 32))
    for new in (1, 3):
        layer.update(*random_kv(1, 2, new, 32))
        out = layer.attend(torch.full((1, 4, new, 32), float("nan")), None, None, 1.0, None, None)
        assert out.isnan().all()


def test_a_forward_of_another_thread_is_not_mixed_in() -> None:
    """A thread in the middle of its forward owns the cache; another one is refused, and may use a fork."""
    model = tiny_model()
    cache = kvpack.PackedCache(model)
    ids = torch.tensor([[5, 6, 7, 8]])
    model(ids, past_key_values=cache)
    fork = cache.fork()
    raised: list[BaseException] = []

    def intrude(module: object, inputs: object, output: object) -> None:
        def forward() -> None:
            with torch.no_grad():
                try:
                    model(ids, past_key_values=cache)
                except kvpack.KvpackError as error:
                    raised.append(error)

        hook.remove()
        thread = threading.Thread(target=forward)
        thread.start()
        thread.join()

    hook = model.model.layers[0].register_forward_hook(intrude)
    out = model(ids, past_key_values=cache).logits
    assert [type(error) for error in raised] == [kvpack.ConcurrencyError]
    assert torch.equal(out, model(ids, past_key_values=fork).logits)
