"""What a model's cache is like, before a method is chosen."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from ..errors import OptionError
from ..memory import readable_bytes
from .contenders import Full
from .forward import evaluating
from .layers import record_attention

# Share of the attention that "most of it" is.
MASS = 0.95
QUERIES = 64


@dataclass(frozen=True)
class Inspection:
    """A model's cache after reading a text, layer by layer.

    Attributes:
        model: its name.
        tokens: tokens read.
        fp16_bytes_per_token: bytes that a token's keys and values take as float16, in the layers with full attention.
        layers: indices of the layers with full attention.
        key_outliers: the largest magnitude of the largest key channel over that of the median channel, mean over heads.
        value_ranges: range of a token's value over its standard deviation, mean over tokens and heads.
        attended: share of the tokens that get 95 % of the attention, mean over heads and the newest queries.
        key_similarity: cosine similarity of keys with those of the next layer, mean over tokens and heads; None for the
            last layer, and where the shapes differ.
        value_similarity: as `key_similarity`, of values.
        key_rank: effective rank of a head's keys over head_dim (Roy and Vetterli 2007: exp of the entropy of the
            singular values' shares), mean over heads.
        value_rank: as `key_rank`, of values.
    """

    model: str
    tokens: int
    fp16_bytes_per_token: int
    layers: list[int] = field(default_factory=list)
    key_outliers: list[float] = field(default_factory=list)
    value_ranges: list[float] = field(default_factory=list)
    attended: list[float] = field(default_factory=list)
    key_similarity: list[float | None] = field(default_factory=list)
    value_similarity: list[float | None] = field(default_factory=list)
    key_rank: list[float] = field(default_factory=list)
    value_rank: list[float] = field(default_factory=list)

    def words(self) -> str:
        """Return what the numbers mean for the families of methods, in plain words."""
        total = readable_bytes(self.fp16_bytes_per_token * self.tokens)
        lines = [
            f"{self.model}: {self.fp16_bytes_per_token:,} bytes a token as float16, {total} at {self.tokens} tokens.",
            _about_bits(fmean(self.key_outliers), fmean(self.value_ranges)),
            _about_tokens(fmean(self.attended)),
            _about_dims(fmean(self.key_rank), fmean(self.value_rank)),
        ]
        similar = [x for x in self.key_similarity if x is not None], [x for x in self.value_similarity if x is not None]
        if all(similar):
            lines.append(_about_layers(*map(fmean, similar)))
        return "\n".join(lines)

    def save(self, folder: str | Path) -> list[Path]:
        """Write `inspect.md`, `inspect.json` and the page of pictures `inspect.png`; return the files."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        page, numbers, picture = (folder / f"inspect.{kind}" for kind in ("md", "json", "png"))
        numbers.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")
        self.plot().savefig(picture, dpi=150)
        listed = "\n".join(f"- {line}" for line in self.words().splitlines())
        page.write_text(f"# The KV cache of {self.model}\n\n{listed}\n\n![by layer](inspect.png)\n", encoding="utf-8")
        return [page, numbers, picture]

    def plot(self) -> Any:
        """Return a matplotlib figure: every measure by layer."""
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(2, 3, figsize=(11, 6), layout="constrained", sharex=True)
        panels: list[tuple[str, dict[str, list[Any]]]] = [
            ("key outliers: largest channel over the median one", {"keys": self.key_outliers}),
            ("range of a value over its deviation", {"values": self.value_ranges}),
            (f"share of tokens with {MASS:.0%} of the attention", {"tokens": self.attended}),
            ("likeness to the next layer (cosine)", {"keys": self.key_similarity, "values": self.value_similarity}),
            ("effective rank over head_dim", {"keys": self.key_rank, "values": self.value_rank}),
        ]
        for axis, (title, curves) in zip(axes.flat, panels, strict=False):
            for name, curve in curves.items():
                points = [(x, y) for x, y in zip(self.layers, curve, strict=True) if y is not None]
                if points:
                    axis.plot(*zip(*points, strict=True), marker=".", label=name)
            axis.set_title(title, fontsize=9)
            axis.set_xlabel("layer", fontsize=8)
            axis.grid(alpha=0.3)
            if len(curves) > 1:
                axis.legend(fontsize=8)
        axes.flat[-1].axis("off")
        axes.flat[-1].text(0, 0.5, "\n\n".join(map(_wrapped, self.words().splitlines())), fontsize=7, va="center")
        figure.suptitle(f"{self.model}, {self.tokens} tokens")
        return figure


def inspect(model: Any, ids: Tensor) -> Inspection:
    """Read `ids` `[n]` with the full cache and look at what it holds.

    Args:
        model: a causal language model on the CPU.
        ids: token ids; more of them give truer ranks: at least a few times the head_dim.

    Raises:
        OptionError: the model has no layer of full attention on transformers' attention interface.
    """
    with evaluating(model):
        seen = record_attention(model, ids, min(QUERIES, len(ids) // 2))
    full = [i for i, layer in enumerate(Full().new_cache(model).layers) if type(layer) is DynamicLayer]
    layers = [i for i in full if i in seen and seen[i].key.shape[2] == len(ids)]
    if not layers:
        raise OptionError("model: none of its layers with full attention can be looked at")
    name = getattr(model.config, "_name_or_path", "") or type(model).__name__
    found = Inspection(
        Path(name).name,
        len(ids),
        sum(2 * x.shape[1] * x.shape[3] for i in layers for x in (seen[i].key, seen[i].value)),
        layers,
    )
    for i, layer in enumerate(layers):
        key, value = seen[layer].key, seen[layer].value
        found.key_outliers.append(_outliers(key[0]))
        found.value_ranges.append(_ranges(value[0]))
        found.attended.append(_attended(seen[layer].query, key, seen[layer].scaling))
        found.key_rank.append(_rank(key[0]))
        found.value_rank.append(_rank(value[0]))
        following = seen[layers[i + 1]] if i + 1 < len(layers) else None
        found.key_similarity.append(_similarity(key, following and following.key))
        found.value_similarity.append(_similarity(value, following and following.value))
    return found


def _outliers(key: Tensor) -> float:
    largest = key.float().abs().amax(1)  # [heads, channels]
    return float((largest.amax(-1) / largest.median(-1).values.clamp_min(1e-12)).mean())


def _ranges(value: Tensor) -> float:
    value = value.float()
    return float(((value.amax(-1) - value.amin(-1)) / value.std(-1).clamp_min(1e-12)).mean())


def _attended(query: Tensor, key: Tensor, scaling: float) -> float:
    """The smallest share of the tokens a query sees that holds `MASS` of its attention."""
    new, tokens = query.shape[2], key.shape[2]
    keys = key.repeat_interleave(query.shape[1] // key.shape[1], 1).float()
    logits = query.float() @ keys.transpose(-1, -2) * scaling
    visible = torch.ones(new, tokens, dtype=torch.bool).tril(tokens - new)
    weights = logits.masked_fill(~visible, -math.inf).softmax(-1).sort(-1, descending=True).values
    needed = (weights.cumsum(-1) < MASS).sum(-1) + 1
    return float((needed / visible.sum(-1)).mean())


def _rank(x: Tensor) -> float:
    """Effective rank over the number of channels."""
    singular = torch.linalg.svdvals(x.float())
    shares = singular / singular.sum(-1, keepdim=True).clamp_min(1e-12)
    entropy = -(shares * shares.clamp_min(1e-12).log()).sum(-1)
    return float(entropy.exp().mean() / x.shape[-1])


def _similarity(x: Tensor, following: Tensor | None) -> float | None:
    if following is None or following.shape != x.shape:
        return None
    return float(torch.nn.functional.cosine_similarity(x.float(), following.float(), dim=-1).mean())


def _about_bits(outliers: float, ranges: float) -> str:
    keys = (
        f"Keys have channels {outliers:.1f} times as large as the median one: quantise them per channel, as KIVI does"
        if outliers > 3
        else f"Key channels are of like size ({outliers:.1f} times the median one): per token is as good"
    )
    return f"Bits: {keys}. A value spans {ranges:.1f} standard deviations, so few bits go far when groups are small."


def _about_tokens(attended: float) -> str:
    if attended < 0.25:
        return f"Tokens: {attended:.0%} of the tokens get {MASS:.0%} of the attention: evicting tokens fits."
    return f"Tokens: attention is spread ({attended:.0%} of the tokens get {MASS:.0%} of it): evicting will be felt."


def _about_dims(keys: float, values: float) -> str:
    fit = "projecting keys to fewer dims fits" if keys < 0.6 else "there is little to prune in the keys' dims"
    more = "values too" if values < 0.6 else "values need theirs"
    return f"Dims: keys use {keys:.0%} of their dims, values {values:.0%} (effective rank): {fit}, {more}."


def _about_layers(keys: float, values: float) -> str:
    fit = (
        "neighbours are alike: sharing fits" if min(keys, values) > 0.8 else "neighbours differ: sharing needs training"
    )
    return f"Layers: likeness to the next layer is {keys:.2f} for keys and {values:.2f} for values: {fit}."


def _wrapped(line: str, width: int = 62) -> str:
    import textwrap

    return textwrap.fill(line, width)
