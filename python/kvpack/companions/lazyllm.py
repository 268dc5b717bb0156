"""LazyLLM: a sooner first token, as deeper layers compute fewer tokens of the prompt."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import attention
from ..cache import PackedCache
from ..errors import OptionError, ShapeError
from ..layer import PackedLayer
from ..methods import Method, Property, register
from ..methods.base import Reasons
from ..methods.combination import Party
from .lazy import Lazy, at, mask, scores, split, wanted

MODELS = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
"""Values of `config.model_type` whose modules have the names and arguments that are relied on."""

# Depths, as shares of the layers, and which share of the tokens goes on from there.
_SCHEDULE = ((1 / 4, 0.6), (1 / 2, 0.2))


@register
class LazyLLM(Method):
    """Progressive pruning of prompt tokens, layer by layer, as LazyLLM's (Fu et al. 2024, arXiv 2407.14057).

    In a `with` statement, every forward of the model drops tokens at the layers of `schedule`: those to which the
    newest token attends least in the layer before, by the mean over its heads. Deeper layers do not compute them. Their
    hidden states go to an auxiliary store, from which they are revived when a later step wants them: a layer computes
    each token at most once. The first and the newest token always stay.

    It shortens the time to the first token. It is no compression to rely on: a token that is left out is held as one
    hidden state (`auxiliary` in `cache.memory()`) in place of keys and values in deeper layers, until it is revived. A
    step of decoding attends to all tokens that a layer has, where the paper's leaves out those that were pruned in this
    step; so it loses less, and saves nothing there. Where tokens are left out, the model returns the newest token's
    output alone: `generate` needs no more, but assisted decoding, `labels` and `output_hidden_states` do.

        with kvpack.LazyLLM(model):
            model.generate(**inputs, past_key_values=kvpack.PackedCache(model))

    Attributes:
        model: a causal language model of one of `MODELS` with `attn_implementation="kvpack"`.
        schedule: from which layer on (1 and above) which share of the context's tokens is computed, falling with depth.
        revive: whether left-out tokens are computed when a later step wants them.
        computed: tokens that each layer computed in this `with` statement, pads included.
    """

    family: ClassVar[str] = "companion"
    name: ClassVar[str] = "lazyllm"
    standard: ClassVar[tuple[str, ...]] = ()

    def __init__(self, model: Any, schedule: Mapping[int, float] | None = None, *, revive: bool = True) -> None:
        """Checks; nothing is changed before the `with` statement.

        Args:
            model: see above.
            schedule: None: a share of 0.6 from a quarter of the layers on, of 0.2 from half of them on.
            revive: see above.

        Raises:
            OptionError: the model is of another family, or its attention is not kvpack's; a layer or a share of the
                schedule is not accepted.
        """
        kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
        if kind not in MODELS or not hasattr(model, "base_model"):
            raise OptionError(f"model: given one of type {kind!r}, expected one of {', '.join(MODELS)}")
        if model.config._attn_implementation != attention.NAME:
            raise OptionError(
                f"model: given one with attn_implementation={model.config._attn_implementation!r}, "
                f"expected {attention.NAME!r}"
            )
        scaling = getattr(model.config, "rope_parameters", None) or getattr(model.config, "rope_scaling", None) or {}
        if scaling.get("rope_type") in ("dynamic", "longrope"):
            raise OptionError(
                f"model: given one with RoPE of type {scaling['rope_type']!r}, whose angles depend on the number of "
                "tokens; expected another"
            )
        self.model = model
        self.revive = revive
        self.schedule = _checked_schedule(schedule, model.config.num_hidden_layers)
        self.computed = [0] * model.config.num_hidden_layers
        self._decoder = model.base_model
        self._hooks: list[Any] = []
        self._cache: PackedCache | None = None
        self._mask: Tensor | None = None
        self._rows = torch.empty(0)  # positions of the hidden states, in their order
        self._cut = False  # whether these are not the forward's own tokens

    @property
    def needs(self) -> Reasons:
        """All tokens that a layer computed are where it computed them."""
        return {Property.ALL_TOKENS: "it knows where in a layer each token is"}

    @property
    def breaks(self) -> Reasons:
        """Layers compute different tokens."""
        return {
            Property.CONSECUTIVE_POSITIONS: "a layer has tokens in the order in which they were computed",
            Property.EQUAL_LAYERS: "deeper layers have fewer tokens",
        }

    def __enter__(self) -> LazyLLM:
        if any(getattr(hook, "_kvpack_lazy", False) for hook in self._decoder._forward_pre_hooks.values()):
            raise OptionError("model: given one that is within LazyLLM already, expected one that is not")
        self.computed = [0] * len(self.computed)

        def begin(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
            self._begin(kwargs)

        begin._kvpack_lazy = True  # type: ignore[attr-defined]
        self._hooks = [
            self._decoder.register_forward_pre_hook(begin, with_kwargs=True),
            *(
                layer.register_forward_pre_hook(self._before(i), with_kwargs=True)
                for i, layer in enumerate(self._decoder.layers)
            ),
            self._decoder.norm.register_forward_pre_hook(self._last_row),
            self._decoder.register_forward_hook(self._end),
        ]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        if self._cache is not None:
            _take_back(self._cache)
        self._hooks, self._cache, self._mask = [], None, None

    def _begin(self, kwargs: dict[str, Any]) -> None:
        """Checks what a forward is given."""
        cache = _cache_of(kwargs)
        if not isinstance(cache, PackedCache):
            raise OptionError(f"past_key_values: given a {type(cache).__name__}, expected a PackedCache with LazyLLM")
        layers = [layer for layer in cache.layers if isinstance(layer, PackedLayer)]
        others = {type(layer).__name__ for layer in cache.layers if not isinstance(layer, PackedLayer)}
        others |= {"sliding windows" for layer in layers if layer.is_sliding}
        if others:
            raise OptionError(f"past_key_values: given one with layers of type {others}, expected full attention only")
        cache.methods.check_with(Party.of(self))
        if cache.store.records():
            raise OptionError(
                "LazyLLM: given a cache that may be rolled back (assisted decoding), expected plain steps"
            )
        _take_back(cache)
        given = kwargs.get("attention_mask")
        if given is not None and (not isinstance(given, Tensor) or given.dim() != 2):
            raise ShapeError("attention_mask: given one that is not [B, tokens], expected that with LazyLLM")
        self._cache, self._mask, self._cut = cache, given, False
        for i, layer in enumerate(layers):
            cache.store.watch(layer.index, i + 1 in self.schedule)

    def _before(self, i: int) -> Any:
        def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            hidden = args[0]
            lazy = self._take_in(hidden, kwargs) if i == 0 else self._lazy
            if i in self.schedule:
                hidden = self._prune(i, hidden)
            slots = lazy.held[i]
            if self._cut:
                ids = lazy.ids.gather(1, self._rows)
                kwargs["position_ids"] = ids
                kwargs["position_embeddings"] = self._decoder.rotary_emb(hidden, position_ids=ids)
            if i >= min(self.schedule, default=len(self.computed)):  # the model's mask is that of the first layer
                kwargs["attention_mask"] = mask(lazy, slots, self._rows)
            lazy.held[i] = torch.cat([slots, self._rows], 1)
            self.computed[i] += self._rows.numel()
            return (hidden, *args[1:]), kwargs

        return hook

    @property
    def _lazy(self) -> Lazy:
        assert self._cache is not None
        lazy = _known(self._cache)
        assert lazy is not None  # a forward begins at layer 0
        return lazy

    def _take_in(self, hidden: Tensor, kwargs: dict[str, Any]) -> Lazy:
        """Adds a forward's tokens to what the cache knows."""
        cache = self._cache
        assert cache is not None
        batch, new, _ = hidden.shape
        past = cache.get_seq_length()
        ids = kwargs["position_ids"].expand(batch, -1)
        valid = None if self._mask is None or bool(self._mask.all()) else self._mask != 0
        if valid is not None and (valid.shape != (batch, past + new) or not bool(valid[:, -1].all())):
            raise ShapeError(
                f"attention_mask: given one of shape {tuple(valid.shape)}, expected {(batch, past + new)} with "
                "pads on the left: the newest token decides what is computed"
            )
        known = _known(cache)
        if known is None:  # dense so far: every layer has all tokens
            before = torch.arange(past).expand(batch, -1)
            held = before if valid is None else (valid[:, :past].cumsum(1) - 1).clamp(min=0)
            lazy = Lazy([before] * len(self.computed), held)
        else:
            lazy = known.begun()
        lazy.running = True
        lazy.ids = torch.cat([lazy.ids, ids], 1)
        lazy.valid = valid
        _know(cache, lazy)
        self._rows = torch.arange(past, past + new).expand(batch, -1)
        return lazy

    def _prune(self, i: int, hidden: Tensor) -> Tensor:
        """Hidden states of the tokens that layer `i` computes: those that came and are wanted, and revived ones."""
        lazy, cache = self._lazy, self._cache
        assert cache is not None
        worth = scores(lazy, lazy.held[i - 1], _attention(cache, i - 1))
        want = wanted(lazy, worth, self.schedule[i])
        kept, left = split(worth, want, self._rows)
        rows, states = at(self._rows, hidden, kept)
        aux = [at(self._rows, hidden, left)]
        if i in lazy.aux:
            positions, stored = lazy.aux[i]
            if self.revive:
                revived, remaining = split(worth, want, positions)
                new_rows, new_states = at(positions, stored, revived)
                rows, states = torch.cat([rows, new_rows], 1), torch.cat([states, new_states], 1)
                positions, stored = at(positions, stored, remaining)
            aux.append((positions, stored))
        if rows.shape == self._rows.shape and not left.shape[1]:
            return hidden  # nothing came and nothing went
        lazy.aux[i] = torch.cat([p for p, _ in aux], 1), torch.cat([h for _, h in aux], 1)
        order = rows.argsort(1)
        self._rows, hidden = at(rows, states, order)
        self._cut = True
        return hidden

    def _last_row(self, _: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0][:, -1:], *args[1:]) if self._cut else args

    def _end(self, *_: Any) -> None:
        if self._cache is not None:
            _know(self._cache, self._lazy.ended())
            for i in range(len(self._cache.layers)):
                self._cache.store.watch(i, False)
        self._cache, self._mask, self._cut = None, None, False


def _known(cache: PackedCache) -> Lazy | None:
    """What is known of a cache; None where it was not filled lazily."""
    return next((companion for companion in cache.companions if isinstance(companion, Lazy)), None)


def _know(cache: PackedCache, lazy: Lazy | None) -> None:
    """Puts in the place of what is known of a cache."""
    others = [companion for companion in cache.companions if not isinstance(companion, Lazy)]
    cache.companions = others if lazy is None else [*others, lazy]


def _take_back(cache: PackedCache) -> None:
    """Forgets a forward that failed, unless the cache holds its tokens, as it came to its last layer."""
    lazy = _known(cache)
    if lazy is not None and lazy.running:
        cache.store.settle_forward()
        whole = cache.get_seq_length() == lazy.held[0].shape[1]
        _know(cache, lazy.ended() if whole else lazy.before)


def _attention(cache: PackedCache, layer: int) -> Tensor:
    """What the newest query attended to in a layer that was watched, `[B, seen]`, the mean over its heads."""
    attention = cache.store.attention(layer)
    lazy = _known(cache)
    if attention is None or lazy is None:
        raise ShapeError("attention of the newest query: given none, expected a forward through kvpack's attention")
    return torch.from_numpy(attention).reshape(len(lazy.ids), -1)


def _checked_schedule(schedule: Mapping[int, float] | None, layers: int) -> dict[int, float]:
    if schedule is None:
        return {max(round(depth * layers), 1): share for depth, share in _SCHEDULE if layers > 1}
    if not isinstance(schedule, Mapping):
        raise OptionError(f"schedule={schedule!r} is not accepted; accepted: a share for each of some layers")
    before = 1.0
    for layer in sorted(schedule, key=lambda layer: (not isinstance(layer, int), layer)):
        share = schedule[layer]
        if not isinstance(layer, int) or isinstance(layer, bool) or not 1 <= layer < layers:
            raise OptionError(f"schedule: layer {layer!r} is not accepted; accepted: 1 to {layers - 1}")
        if not isinstance(share, int | float) or isinstance(share, bool) or not 0 < share <= before:
            raise OptionError(
                f"schedule: a share of {share!r} from layer {layer} on is not accepted; accepted: above 0, and at most "
                f"{before}, that of the layers before"
            )
        before = share
    return {layer: float(schedule[layer]) for layer in sorted(schedule)}


def _cache_of(kwargs: dict[str, Any]) -> Any:
    """The cache that a decoder is given, which releases of transformers call differently."""
    found = kwargs.get("cache")
    return kwargs.get("past_key_values") if found is None else found
