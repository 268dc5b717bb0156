"""What `kvpack inspect` says of a cache, on caches whose answers are known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from kvpack.evaluation import inspect as look
from kvpack.evaluation.layers import record_attention
from support import tiny_config, tiny_model


def test_outliers_are_of_the_largest_channel() -> None:
    key = torch.ones(2, 50, 9)
    key[0, :, 3] = -7
    key[1, 20, 5] = 3
    assert look._outliers(key) == pytest.approx((7 + 3) / 2)


def test_ranks_from_one_to_all_channels() -> None:
    assert look._rank(torch.outer(torch.randn(90), torch.randn(8))[None]) == pytest.approx(1 / 8, abs=1e-3)
    assert look._rank(torch.eye(8).repeat(5, 1)[None]) == pytest.approx(1, abs=1e-4)


def test_attention_that_is_even_and_attention_to_one_token() -> None:
    key = torch.randn(1, 2, 200, 16)
    assert look._attended(torch.zeros(1, 4, 1, 16), key, 1.0) == pytest.approx(0.95, abs=0.01)
    key[:, :, 7] = 100
    assert look._attended(torch.ones(1, 4, 1, 16), key, 1.0) == pytest.approx(1 / 200)


def test_likeness_of_equal_and_opposite_layers() -> None:
    x = torch.randn(1, 2, 30, 8)
    assert look._similarity(x, 3 * x) == pytest.approx(1)
    assert look._similarity(x, -x) == pytest.approx(-1)
    assert look._similarity(x, None) is None
    assert look._similarity(x, x[:, :1]) is None


def test_what_is_recorded_is_what_the_model_attends_to() -> None:
    model = tiny_model(tiny_config(initializer_range=0.2), attention="sdpa")
    ids = torch.randint(3, 128, (90,))
    whole = record_attention(model, ids, 89)
    some = record_attention(model, ids, 20)
    for layer, asked in some.items():
        torch.testing.assert_close(asked.query, whole[layer].query[:, :, -20:], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(asked.key, whole[layer].key, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(asked.value, whole[layer].value, rtol=1e-4, atol=1e-5)
        assert asked.scaling == pytest.approx(32**-0.5)


def test_a_page_for_a_model(tmp_path: Path) -> None:
    config: Any = tiny_config(layers=3, initializer_range=0.2)
    found = look.inspect(tiny_model(config, attention="sdpa"), torch.randint(3, 128, (120,)))
    assert found.layers == [0, 1, 2]
    assert found.fp16_bytes_per_token == 3 * 2 * 2 * 32 * 2
    assert found.key_similarity[-1] is None
    assert all(0 < share <= 1 for share in found.attended + found.key_rank + found.value_rank)
    files = found.save(tmp_path)
    assert {path.name for path in files} == {"inspect.md", "inspect.json", "inspect.png"}
    assert json.loads((tmp_path / "inspect.json").read_text())["tokens"] == 120
    for word in ("Bits:", "Tokens:", "Dims:", "Layers:"):
        assert word in (tmp_path / "inspect.md").read_text()
