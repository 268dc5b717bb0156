"""What each layer's keys and values lose at each width."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .. import attention
from ..cache import PackedCache
from ..errors import OptionError
from ..forward import CACHE_ARGUMENT
from ..layer import PackedLayer
from ..methods import KIVI, Exact, Graded, KeyValue, PerLayer, Quantize
from .budget import CHUNK, Choices, Option, Side, allocate

Progress = Callable[[int], object]
# Tokens for which a page has room that is packed token by token.
_PAGE = 128
# Tokens of which some blocks are packed, whatever the codec's window.
_TRIED = 2048


@dataclass
class Losses:
    """KL to the full cache, in nats a token, of single packed layers.

    Attributes:
        kl: by layer, side and width: sums over tokens.
        bits: by the same: bits a number that were held, scales included.
        tokens: how many were predicted.
    """

    kl: dict[tuple[int, int, float], float] = field(default_factory=dict)
    bits: dict[tuple[int, int, float], float] = field(default_factory=dict)
    tokens: int = 0

    @property
    def choices(self) -> Choices:
        """The options of every layer's keys and values."""
        found: dict[tuple[int, int], list[Option]] = {}
        for (layer, side, width), loss in self.kl.items():
            option = Option(width, self.bits[layer, side, width], loss / self.tokens)
            found.setdefault((layer, side), []).append(option)
        return found

    def tensors(self) -> dict[str, Tensor]:
        """What was measured, for the file: rows of layer, side, width, bits a number and KL."""
        rows = [[*place, self.bits[place], loss / self.tokens] for place, loss in self.kl.items()]
        return {"losses": torch.tensor(rows, dtype=torch.float64)}

    def compare(
        self,
        model: Any,
        documents: Tensor,
        both: tuple[Side, Side],
        chosen: Mapping[int, tuple[float, float]],
        budget: float,
        progress: Progress,
    ) -> dict[str, Any]:
        """Return the KL of all layers at once, at the chosen widths and at equal ones of no more bits."""
        layers = len(chosen)
        named = {layer: _codec(both, widths) for layer, widths in chosen.items()}
        spent = sum(self.bits[layer, side, widths[side]] for layer, widths in chosen.items() for side in (0, 1))
        equal = [
            (sum(self.kl[layer, side, widths[side]] for layer in chosen for side in (0, 1)), widths)
            for widths in ((a, b) for a in both[0].widths for b in both[1].widths)
            if sum(self.bits[layer, side, widths[side]] for layer in chosen for side in (0, 1)) / layers / 2 <= budget
        ]
        report: dict[str, Any] = {"bits": spent / layers / 2, "sum_of_losses": self._sum(chosen), "kl": 0.0}
        codecs: dict[str, Quantize] = {"kl": PerLayer(Exact(), named)}
        if equal:
            widths = min(equal)[1]
            report |= {
                "equal": "/".join(side.text(width) for side, width in zip(both, widths, strict=True)),
                "equal_kl": 0.0,
            }
            codecs["equal_kl"] = PerLayer(Exact(), dict.fromkeys(chosen, _codec(both, widths)))
        for ids in documents:
            full = _read(model, PackedCache(model), ids)
            for name, codec in codecs.items():
                report[name] += _kl(full, _read(model, PackedCache(model, quantize=codec), ids)) / self.tokens
                progress(CHUNK)
        return report

    def _sum(self, chosen: Mapping[int, tuple[float, float]]) -> float:
        return (
            sum(self.kl[layer, side, widths[side]] for layer, widths in chosen.items() for side in (0, 1)) / self.tokens
        )


def spend(losses: Losses, budget: float) -> dict[int, tuple[float, float]]:
    """Return the widths of keys and values of each layer."""
    widths: dict[int, list[float]] = {}
    for (layer, side), option in sorted(allocate(losses.choices, budget).items()):
        widths.setdefault(layer, [0.0, 0.0])[side] = option.width
    return {layer: (keys, values) for layer, (keys, values) in widths.items()}


def measure_losses(model: Any, documents: Tensor, both: tuple[Side, Side], progress: Progress) -> Losses:
    """Measure every layer, side and width.

    A document is read up to its last tokens on an empty cache, whose attention is exact: so all layers' keys and values
    are the same whatever the codec, and one forward packs all layers at a width. Then the last tokens are read from a
    cache whose layers are exact but for one, which is taken from there.
    """
    losses = Losses()
    model.set_attn_implementation(attention.NAME)
    for ids in documents:
        exact = PackedCache(model)
        _feed(model, exact, ids[:-CHUNK])
        full = _predict(model, exact.fork(), ids)
        losses.tokens += CHUNK
        progress(CHUNK)
        for side, width in [(i, width) for i in (0, 1) for width in both[i].widths]:
            codec = both[side].at(width)
            packed = PackedCache(model, quantize=KeyValue(codec, Exact()) if side == 0 else KeyValue(Exact(), codec))
            _feed(model, packed, ids[:-CHUNK])
            progress(len(ids) - CHUNK)
            for i, layer in enumerate(packed.layers):
                if not isinstance(layer, PackedLayer):
                    continue
                trial = exact.fork()
                trial.layers[i] = layer.fork()
                place = (i, side, float(width))
                losses.kl[place] = losses.kl.get(place, 0.0) + _kl(full, _predict(model, trial, ids))
                losses.bits[place] = _bits(layer, side, codec)
                progress(CHUNK)
    return losses


def text_of(both: tuple[Side, Side], widths: tuple[float, float]) -> str:
    """The codec of keys and values at these widths, as text."""
    return "/".join(side.text(width) for side, width in zip(both, widths, strict=True))


def _codec(both: tuple[Side, Side], widths: tuple[float, float]) -> KeyValue:
    return KeyValue(both[0].at(widths[0]), both[1].at(widths[1]))


def _bits(layer: PackedLayer, side: int, codec: Quantize) -> float:
    """Bits a number that is packed, scales included, in pages that are full."""
    memory = layer.memory()
    codes = layer.packed(0, 0)["key_codes" if side == 0 else "value_codes"]
    assert isinstance(codes, Tensor)
    tokens, dim = codes.shape
    if side == 1 or not isinstance(codec, KIVI | Graded):
        tokens = -(-tokens // _PAGE) * _PAGE
    numbers = tokens * dim * layer.kv_heads
    return float(8 * (memory["codes"] + memory["scales"]) / max(numbers, 1))


def range_of_bits(config: Any, both: tuple[Side, Side]) -> tuple[float, float]:
    """Return the bits a number, scales included, that the narrowest and the widest codecs hold, for such a model.

    A layer of random numbers is packed to find out.

    Raises:
        ModelNeededError: the codec needs the model itself.
        OptionError: the model has no layer that is packed.
    """
    text = config.get_text_config(decoder=True)
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    numbers = torch.randn(1, heads, _TRIED, dim, generator=torch.Generator().manual_seed(0))

    def held(side: int, width: float) -> float:
        codec = both[side].at(width)
        cache = PackedCache(config, quantize=KeyValue(codec, Exact()) if side == 0 else KeyValue(Exact(), codec))
        layer = next((layer for layer in cache.layers if isinstance(layer, PackedLayer)), None)
        if layer is None:
            raise OptionError("model: given one none of whose layers are packed, expected layers with full attention")
        layer.load(numbers, numbers, None)
        return _bits(layer, side, codec)

    least, most = ([held(side, pick(both[side].widths)) for side in (0, 1)] for pick in (min, max))
    return sum(least) / 2, sum(most) / 2


def _feed(model: Any, cache: PackedCache, ids: Tensor) -> None:
    model(**{CACHE_ARGUMENT: cache}, input_ids=ids[None], use_cache=True, logits_to_keep=1)


def _predict(model: Any, cache: PackedCache, ids: Tensor) -> Tensor:
    """Log-probabilities `[CHUNK, vocabulary]` after each of the last tokens."""
    logits = model(**{CACHE_ARGUMENT: cache}, input_ids=ids[None, -CHUNK:], use_cache=True).logits[0]
    return logits.float().log_softmax(-1)


def _read(model: Any, cache: PackedCache, ids: Tensor) -> Tensor:
    _feed(model, cache, ids[:-CHUNK])
    return _predict(model, cache, ids)


def _kl(full: Tensor, other: Tensor) -> float:
    """Sum over tokens of the divergence from the full cache's distribution."""
    return float(torch.nn.functional.kl_div(other, full, reduction="sum", log_target=True))
