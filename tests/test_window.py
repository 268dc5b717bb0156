"""What stays exact after a prompt, and what `full_window` changes."""

from __future__ import annotations

from typing import Any

import kvpack
import pytest
import torch
from kvpack.methods.spec import parse_spec
from support import forward, random_kv, tiny_config

LENGTHS = [3, 100, 131, 132, 200, 259, 260, 261, 388, 390]


def newest_exact(codec: Any, lengths: list[int]) -> tuple[int, int]:
    """How many of the newest keys and of the newest values are held exactly after forwards of these lengths."""
    torch.manual_seed(0)
    cache = kvpack.PackedCache(tiny_config(layers=1, heads=2, kv_heads=1, head_dim=32), quantize=codec)
    given: list[list[torch.Tensor]] = [[], []]
    for n in lengths:
        for column, x in zip(given, random_kv(1, 1, n, 32), strict=True):
            column.append(x)
        forward(cache, given[0][-1], given[1][-1], torch.zeros(1, 2, n, 32))
    layer = cache.layers[0]
    counts = []
    for column, stored in zip(given, (layer.keys, layer.values), strict=True):
        same = (torch.cat(column, 2) == stored).all(-1)[0, 0].tolist()
        counts.append(next((i for i, exact in enumerate(reversed(same)) if not exact), len(same)))
    return counts[0], counts[1]


def expected(n: int, window: int, full: bool, per_token: bool) -> int:
    """Per token the newest `window`; in blocks what is left of the last one, after a full window if asked for."""
    beyond_sinks = max(n - 4, 0)
    packed = max(beyond_sinks - window, 0) if per_token or full else beyond_sinks
    left = beyond_sinks - (packed if per_token else packed // window * window)
    return n if left == beyond_sinks else left


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("full", [False, True])
def test_what_stays_exact_after_a_prompt(n: int, full: bool) -> None:
    keys, values = expected(n, 128, full, False), expected(n, 128, full, True)
    assert newest_exact(kvpack.KIVI(bits=2, full_window=full), [n]) == (keys, values)
    assert newest_exact(kvpack.Graded(key_bits=2, value_bits=2, full_window=full), [n]) == (keys, values)
    assert newest_exact(kvpack.KVarN(bits=2, full_window=full), [n]) == (keys, keys)
    assert newest_exact(kvpack.Rotated(bits=2), [n]) == (values, values)


@pytest.mark.parametrize(
    "codec",
    [
        kvpack.KIVI(bits=2, window=32, full_window=True),
        kvpack.Graded(key_bits=2, value_bits=2, group=32, window=32, full_window=True),
        kvpack.KVarN(bits=2, full_window=True),
    ],
    ids=lambda codec: codec.name,
)
def test_a_full_window_is_held_while_decoding(codec: Any) -> None:
    window = getattr(codec, "window", 128)
    for lengths in ([300, 1, 1, 40, 1], [5] + [1] * (2 * window + 10), [window + 4, window, 1]):
        keys, values = newest_exact(codec, lengths)
        assert min(keys, values) >= min(window, sum(lengths))


@pytest.mark.parametrize("given", [1, 0, None, "yes"])
@pytest.mark.parametrize("method", [kvpack.KIVI, kvpack.Graded, kvpack.KVarN])
def test_bad_values(method: Any, given: Any) -> None:
    with pytest.raises(kvpack.OptionError, match=r"full_window.*accepted: True, False"):
        method(full_window=given)


def test_as_text_and_in_repr() -> None:
    codec = kvpack.KIVI(bits=4, full_window=True)
    for value in ("true", "True"):
        assert parse_spec(f"kivi:bits=4:full_window={value}").options == {"quantize": codec}
    assert "full_window=True" in repr(codec)
