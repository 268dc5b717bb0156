"""Which of the layers that transformers would make are packed, and as what."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import cache_utils
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from . import _kvpack
from .hybrid import PackedHybridLayer
from .identity import attribute
from .layer import PackedLayer
from .methods import Methods, Site

_PLAIN = (DynamicLayer, DynamicSlidingWindowLayer)
# Older releases do not have them.
_HYBRID = tuple(
    getattr(cache_utils, name)
    for name in ("LinearAttentionAndFullAttentionLayer", "LinearAttentionAndSlidingWindowAttentionLayer")
    if hasattr(cache_utils, name)
)


def sites_of(layers: Sequence[Any], config: Any, model: Any, *, encoder: bool) -> dict[int, Site]:
    """The layers that are packed, by number: those of full attention, of a sliding window and of chunks.

    Args:
        layers: those of a DynamicCache for the model.
        config: the configuration of the model's decoder.
        model: the model, where there is one.
        encoder: whether they hold an encoder's tokens, all of which are seen.
    """
    return {
        i: Site(i, len(layers), config, model, None if encoder else _window(layer, config), encoder)
        for i, layer in enumerate(layers)
        if type(layer) in (*_PLAIN, *_HYBRID)
    }


def _window(layer: Any, config: Any) -> int | None:
    """How many of the newest tokens a query sees; None where it is all that the model has positions for."""
    window = getattr(layer, "sliding_window", None)
    longest = attribute(config, "max_position_embeddings")
    return None if window is None or (isinstance(longest, int) and window >= longest) else int(window)


def layers_in_forwards(layers: Sequence[Any], config: Any) -> list[int]:
    """The layers that a forward gives something, by number.

    Args:
        layers: those of a DynamicCache for the model.
        config: the configuration of the model's decoder.
    """
    kinds = attribute(config, "layer_types") or attribute(config, "layers_block_type") or ()
    # Some releases make layers of linear attention for what has no attention at all.
    nothing = {i for i, kind in enumerate(kinds) if kind in ("mlp", "moe") and len(kinds) == len(layers)}
    return [i for i, layer in enumerate(layers) if type(layer).__name__ != "DummyLayer" and i not in nothing]


def pack(layer: Any, store: _kvpack.Cache, methods: Methods, site: Site) -> PackedLayer:
    """What takes the place of one of transformers' layers."""
    if type(layer) in _HYBRID:
        return PackedHybridLayer(store, site.layer, methods, site, states=len(layer.conv_states))
    return PackedLayer(store, site.layer, methods, site)
