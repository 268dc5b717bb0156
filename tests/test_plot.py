"""Pictures of what a cache kept."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import kvpack
import pytest
import torch
from support import tiny_model

TOKENIZER = SimpleNamespace(decode=lambda ids: f" t{ids[0]}")


def read(evict: object, tokens: int = 200) -> tuple[kvpack.PackedCache, torch.Tensor]:
    model = tiny_model()
    cache = kvpack.PackedCache(model, evict=evict)
    ids = torch.randint(3, 128, (1, tokens))
    model(ids, past_key_values=cache)
    return cache, ids


def test_what_is_drawn_is_what_is_held(tmp_path: Path) -> None:
    cache, ids = read(kvpack.SnapKV(budget=0.25))
    shares = kvpack.plot.kept_shares(cache)
    assert shares.shape == (2, 200)
    for layer in range(2):
        heads = [set(cache.kept(layer, head)) for head in range(2)]
        expected = [sum(p in held for held in heads) / 2 for p in range(200)]
        assert shares[layer].tolist() == expected
    assert shares.mean().item() == pytest.approx(0.25)
    figure = kvpack.plot.kept(cache, TOKENIZER, ids)
    above, below = figure.axes
    assert torch.equal(torch.from_numpy(above.images[0].get_array().data), shares)
    assert "25% of 200 tokens" in above.get_title()
    written = "".join(text.get_text() for text in below.texts)
    assert f"t{ids[0, -1]}" in written
    figure.savefig(tmp_path / "kept.png")
    assert (tmp_path / "kept.png").stat().st_size > 10_000


def test_a_span_is_written_out() -> None:
    cache, ids = read(kvpack.StreamingLLM(budget=50))
    figure = kvpack.plot.kept(cache, TOKENIZER, ids[0], span=(10, 14))
    written = "".join(text.get_text() for text in figure.axes[1].texts)
    assert written == "".join(f" t{i}" for i in ids[0, 10:14].tolist())


@pytest.mark.parametrize("ids", ["prompt", "output", "row", "list"])
def test_ids_of_the_prompt_and_of_the_output_are_drawn(ids: str) -> None:
    """As a user has them after `generate`, whose last token the cache has not seen."""
    model = tiny_model()
    cache = kvpack.PackedCache(model, evict=kvpack.SnapKV(budget=0.25))
    prompt = torch.randint(3, 128, (1, 120))
    output = model.generate(prompt, past_key_values=cache, max_new_tokens=10, min_new_tokens=10, do_sample=False)
    given = {"prompt": prompt, "output": output, "row": output[0], "list": prompt[0].tolist()}[ids]
    figure = kvpack.plot.kept(cache, TOKENIZER, given)
    drawn = torch.from_numpy(figure.axes[0].images[0].get_array().data)
    tokens = 120 if ids in ("prompt", "list") else 129
    assert torch.equal(drawn, kvpack.plot.kept_shares(cache)[:, :tokens])
    written = "".join(text.get_text() for text in figure.axes[1].texts)
    assert f"t{output[0, tokens - 1]}" in written
    assert f"of {tokens} tokens" in figure.axes[0].get_title()


def test_mistakes_are_named() -> None:
    cache, ids = read(None, 20)
    with pytest.raises(kvpack.ShapeError, match="ids: given none, expected up to 20"):
        kvpack.plot.kept(cache, TOKENIZER, ids[:, :0])
    with pytest.raises(kvpack.OptionError, match="<= 5"):
        kvpack.plot.kept(cache, TOKENIZER, ids[:, :5], span=(0, 6))
    with pytest.raises(kvpack.OptionError, match="span"):
        kvpack.plot.kept(cache, TOKENIZER, ids, span=(5, 30))
    with pytest.raises(kvpack.OptionError, match="no packed tokens"):
        kvpack.plot.kept(kvpack.PackedCache(tiny_model()), TOKENIZER, ids)
