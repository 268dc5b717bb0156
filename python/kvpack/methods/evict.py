"""The `evict` family: fewer tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

from .. import _kvpack
from ..errors import ModelNeededError, OptionError
from ..rotation import rotation_of
from .quantize import Site, check_whole

Amount: TypeAlias = int | float
Common: TypeAlias = tuple[Any, ...]

_BUDGET = "a whole number of tokens from 1, a share of the prompt above 0 up to 1.0, or one of such for each layer"


@dataclass(frozen=True, kw_only=True)
class Evict(ABC):
    """A method that chooses which tokens of a KV head stay; what goes is freed.

    Tokens are chosen when a prompt was read, before anything is packed: a forward of more than 16 tokens, or the first
    one. With `decode` the budget is held while tokens are generated too: when it is exceeded by `block` tokens, as many
    go. What was packed by then goes in the groups in which its codec packed it, by the mean of the tokens' scores.
    Scores are of all KV heads apart, positions stay what they were, and a budget that has room for all changes nothing.

    Attributes:
        name: in the registry, and in methods written as text (`snapkv:budget=0.25`).
        standard: settings, as text, at which it is measured beside others.
        sinks: tokens at the beginning of each sequence that always stay, not counting pads.
        protect: spans `(first, end)` of tokens that always stay, counted from the first token that is no pad: a system
            prompt, for example.
        decode: whether the budget is held while decoding too.
        block: tokens by which it may be exceeded there.
    """

    name: ClassVar[str]
    standard: ClassVar[tuple[str, ...]]
    reads_keys: ClassVar[bool] = False  # other than by attention

    sinks: int = 0
    protect: tuple[tuple[int, int], ...] = ()
    decode: bool = False
    block: int = 128

    def __post_init__(self) -> None:
        check_whole(self, sinks=0, block=1)
        if not isinstance(self.decode, bool):
            raise OptionError(f"decode={self.decode!r} is not accepted; accepted: True, False")
        object.__setattr__(self, "protect", _spans(self.protect))
        self._check()
        self.make()  # Rust knows the rest of the rules

    def _check(self) -> None:  # noqa: B027  # not every method has fields of its own
        """Raises OptionError for the first field of a method's own that is not accepted."""

    @abstractmethod
    def make(self, site: Site | None = None, floor: float | None = None) -> _kvpack.Eviction:
        """The method as the store of a layer knows it; with AdaKV's `floor` the layer's heads share one budget."""

    def _common(
        self,
        site: Site | None,
        floor: float | None,
        budget: Amount | Sequence[Amount],
        recent: Amount,
        pyramid: tuple[int, int, int, int] | None = None,
    ) -> Common:
        block = self.block if self.decode else None
        return _of_layer(budget, site), self.sinks, recent, block, floor, list(self.protect), pyramid


def _amount(name: str, value: Any, accepted: str) -> Amount:
    whole = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31
    if not whole and not (isinstance(value, float) and 0 <= value <= 1):
        raise OptionError(f"{name}={value!r} is not accepted; accepted: {accepted}")
    amount: Amount = value
    return amount


def _of_layer(budget: Amount | Sequence[Amount], site: Site | None) -> Amount:
    """The budget of a layer; without a site that of the first, after all were checked."""
    if not isinstance(budget, Sequence) or isinstance(budget, str):
        return _amount("budget", budget, _BUDGET)
    amounts = [_amount("budget", amount, _BUDGET) for amount in budget]
    if not amounts or (site is not None and len(amounts) != site.layers):
        layers = "at least one" if site is None else f"{site.layers}, as many as the model has layers"
        raise OptionError(f"budget: given {len(amounts)} numbers; accepted: {layers}")
    return amounts[0 if site is None else site.layer]


def _spans(spans: Any) -> tuple[tuple[int, int], ...]:
    accepted = "spans (first, end) of whole numbers with first < end"
    try:
        pairs = tuple((first, end) for first, end in spans)
    except (TypeError, ValueError):
        raise OptionError(f"protect={spans!r} is not accepted; accepted: {accepted}") from None
    for first, end in pairs:
        whole = all(isinstance(x, int) and not isinstance(x, bool) for x in (first, end))
        if not whole or not 0 <= first < end < 2**31:
            raise OptionError(f"protect: ({first!r}, {end!r}) is not accepted; accepted: {accepted}")
    return pairs


@dataclass(frozen=True)
class SnapKV(Evict):
    """What the last queries of the prompt look at stays (Li et al. 2024, arXiv 2404.14469).

    The last `window` queries vote for the tokens before them with their attention; votes are averaged over the query
    heads that read a KV head, and pooled over neighbouring tokens. The best tokens stay, and the window itself.

    The question has to stand at the end of the prompt. The paper chooses once, after the first prompt; here tokens are
    chosen again after every later prompt, and with `decode` from the last queries of the text generated so far.

    Attributes:
        budget: tokens that stay a KV head, the window included, or a share of the prompt; or one for each layer.
        window: queries that vote.
        kernel: votes that are pooled, an odd number.
        pooling: "avg" or "max".
    """

    name: ClassVar[str] = "snapkv"
    standard: ClassVar[tuple[str, ...]] = ("snapkv:budget=0.5", "snapkv:budget=0.25", "snapkv:budget=0.1")

    budget: Amount | Sequence[Amount] = 2048
    window: int = 32
    kernel: int = 5
    pooling: str = "avg"

    def _check(self) -> None:
        check_whole(self, window=1, kernel=1)
        if self.pooling not in ("avg", "max"):
            raise OptionError(f"pooling={self.pooling!r} is not accepted; accepted: 'avg', 'max'")

    def make(self, site: Site | None = None, floor: float | None = None) -> _kvpack.Eviction:
        """As the store knows it."""
        common = self._common(site, floor, self.budget, self.window)
        return _kvpack.Eviction.snapkv(common, self.window, self.kernel, self.pooling)


@dataclass(frozen=True)
class PyramidKV(SnapKV):
    """SnapKV with budgets that fall from the first layer to the last (Cai et al. 2024, arXiv 2406.02069).

    With the mean budget `C` and window `w` the last layer has `w + (C - w) / beta` tokens, the first as much more than
    `C`, the others lie on the line between; no layer has more than the prompt.

    Attributes:
        beta: how steep it is.
    """

    name: ClassVar[str] = "pyramidkv"
    standard: ClassVar[tuple[str, ...]] = ("pyramidkv:budget=0.25", "pyramidkv:budget=0.1")

    window: int = 64
    beta: int = 20

    def _check(self) -> None:
        super()._check()
        check_whole(self, beta=1)

    def make(self, site: Site | None = None, floor: float | None = None) -> _kvpack.Eviction:
        """As the store knows it."""
        layer, layers = (0, 1) if site is None else (site.layer, site.layers)
        common = self._common(site, floor, self.budget, self.window, (self.beta, layer, layers, self.window))
        return _kvpack.Eviction.snapkv(common, self.window, self.kernel, self.pooling)


@dataclass(frozen=True)
class _Attention(Evict):
    shared: ClassVar[bool] = False

    budget: Amount | Sequence[Amount] = 0.2
    recent: Amount = 0.5
    decode: bool = True

    def _check(self) -> None:
        _amount("recent", self.recent, "a whole number of tokens, or a share of the budget from 0 to 1.0")

    def _alpha(self) -> float:
        return 1.0

    def make(self, site: Site | None = None, floor: float | None = None) -> _kvpack.Eviction:
        """As the store knows it."""
        common = self._common(site, floor, self.budget, self.recent)
        return _kvpack.Eviction.attention(common, self._alpha(), self.shared)


@dataclass(frozen=True)
class H2O(_Attention):
    """Heavy hitters: what received the most attention of all queries so far (Zhang et al. 2023, arXiv 2306.14048).

    Attention is summed over the query heads that read a KV head. It costs as much again as a prompt's own attention.

    Attributes:
        budget: tokens that stay a KV head, or a share of the prompt; or one for each layer. The paper has 0.2.
        recent: the newest tokens, which stay: so many, or a share of the budget.
    """

    name: ClassVar[str] = "h2o"
    standard: ClassVar[tuple[str, ...]] = ("h2o:budget=0.5", "h2o:budget=0.25", "h2o:budget=0.1")


@dataclass(frozen=True)
class A2SF(_Attention):
    """Accumulated attention that is forgotten again (Jo and Shin 2024, arXiv 2407.20485).

    `A <- alpha A + S` with the attention `S` of each query, summed over the query heads that read a KV head: first
    tokens gain nothing from having been seen by more queries. Of a prompt only queries whose weight is above 1e-6 are
    looked at.

    Attributes:
        budget: tokens that stay a KV head, or a share of the prompt; or one for each layer.
        alpha: the forgetting factor, 0 to 1.
        recent: the newest tokens, which stay: so many, or a share of the budget.
    """

    name: ClassVar[str] = "a2sf"
    standard: ClassVar[tuple[str, ...]] = ("a2sf:budget=0.5", "a2sf:budget=0.25", "a2sf:budget=0.1")

    budget: Amount | Sequence[Amount] = 256
    recent: Amount = 16
    alpha: float = 0.95

    def _check(self) -> None:
        super()._check()
        if isinstance(self.alpha, bool) or not isinstance(self.alpha, int | float) or not 0 <= self.alpha <= 1:
            raise OptionError(f"alpha={self.alpha!r} is not accepted; accepted: 0 to 1")

    def _alpha(self) -> float:
        return float(self.alpha)


@dataclass(frozen=True)
class TOVA(_Attention):
    """What the last query does not look at goes (Oren et al. 2024, arXiv 2401.06104).

    All heads of a layer keep the same tokens, by the mean of their attention.

    Attributes:
        budget: tokens that stay, or a share of the prompt; or one for each layer.
        recent: the newest tokens, which stay.
    """

    name: ClassVar[str] = "tova"
    standard: ClassVar[tuple[str, ...]] = ("tova:budget=0.5", "tova:budget=0.25", "tova:budget=0.1")
    shared: ClassVar[bool] = True

    budget: Amount | Sequence[Amount] = 0.25
    recent: Amount = 1

    def _alpha(self) -> float:
        return 0.0


@dataclass(frozen=True)
class StreamingLLM(Evict):
    """The first and the newest tokens stay (Xiao et al. 2023, arXiv 2309.17453).

    Keys keep the positions at which they were cached. The paper counts positions within the cache instead, which lets a
    text go on beyond the length that a model was trained for; that is not done here.

    Attributes:
        budget: tokens that stay, sinks included, or a share of the prompt; or one for each layer.
    """

    name: ClassVar[str] = "streaming"
    standard: ClassVar[tuple[str, ...]] = ("streaming:budget=0.5", "streaming:budget=0.25", "streaming:budget=0.1")

    budget: Amount | Sequence[Amount] = 1024
    sinks: int = 4
    decode: bool = True

    def make(self, site: Site | None = None, floor: float | None = None) -> _kvpack.Eviction:
        """As the store knows it."""
        return _kvpack.Eviction.newest(self._common(site, floor, self.budget, 0))


@dataclass(frozen=True)
class Longformer(Evict):
    """The shape of Longformer's pattern (Beltagy et al. 2020, arXiv 2004.05150) as a retention mask.

    What the pattern is worth in Longformer comes from its training, which a model here has not had.
    A window of the newest tokens, the first ones, global tokens (`protect`), and of all others every `dilation`-th: of
    KV head `h` those whose number plus `h` is a multiple. Everything else goes.

    Attributes:
        window: newest tokens that stay.
        dilation: distance of the older tokens that stay; 0: none does.
        budget: what stays at most, or a share of the prompt; or one for each layer. The oldest of the pattern go first.
    """

    name: ClassVar[str] = "longformer"
    standard: ClassVar[tuple[str, ...]] = ("longformer:window=256:dilation=4",)

    window: int = 512
    dilation: int = 0
    budget: Amount | Sequence[Amount] = 1.0
    sinks: int = 4
    decode: bool = True

    def _check(self) -> None:
        check_whole(self, window=1, dilation=0)

    def make(self, site: Site | None = None, floor: float | None = None) -> _kvpack.Eviction:
        """As the store knows it."""
        return _kvpack.Eviction.dilated(self._common(site, floor, self.budget, self.window), self.dilation)


@dataclass(frozen=True)
class ExpectedAttention(Evict):
    """What queries to come would attend to stays (Devoto et al. 2025, arXiv 2510.00636).

    Queries before RoPE are taken to be normally distributed, with mean and covariance of the prompts' queries after the
    sinks. A token's score is the attention that such a query would give it on average over the next positions, times
    the length of its value. The covariance is averaged over rotations exactly, where the authors' code rotates it by
    their average. While decoding, tokens are chosen by what is known from the prompts.

    The model's rotary embedding is found by a few short forwards, once for each model: `PackedCache(model, ...)`.

    Attributes:
        budget: tokens that stay a KV head, or a share of the prompt; or one for each layer.
        future: positions over which is averaged.
        covariance: whether the covariance counts, or the mean alone.
        values: whether scores are multiplied with the lengths of the values.
        epsilon: what is added to the attention before.
    """

    name: ClassVar[str] = "expected"
    reads_keys: ClassVar[bool] = True
    standard: ClassVar[tuple[str, ...]] = ("expected:budget=0.5", "expected:budget=0.25", "expected:budget=0.1")

    budget: Amount | Sequence[Amount] = 0.5
    sinks: int = 4
    future: int = 512
    covariance: bool = True
    values: bool = True
    epsilon: float = 0.0

    def _check(self) -> None:
        check_whole(self, future=1)
        for name in ("covariance", "values"):
            if not isinstance(getattr(self, name), bool):
                raise OptionError(f"{name}={getattr(self, name)!r} is not accepted; accepted: True, False")
        if isinstance(self.epsilon, bool) or not isinstance(self.epsilon, int | float):
            raise OptionError(f"epsilon={self.epsilon!r} is not accepted; accepted: 0 and positive numbers")

    def make(self, site: Site | None = None, floor: float | None = None) -> _kvpack.Eviction:
        """As the store knows it."""
        pairs, frequencies = ((), ()) if site is None else self._rotation(site)
        common = self._common(site, floor, self.budget, 0)
        return _kvpack.Eviction.expected(
            common, self.future, self.covariance, self.values, self.epsilon, list(pairs), list(frequencies)
        )

    def _rotation(self, site: Site) -> tuple[Sequence[tuple[int, int]], Sequence[float]]:
        """Pairs of channels that a layer's rotary embedding turns, and their angles from one position to the next."""
        if site.model is None:
            raise ModelNeededError(
                "evict=ExpectedAttention(...) is not accepted for a cache made from a configuration; accepted: "
                "PackedCache(model, ...), as the model's rotary embedding has to be known"
            )
        rotation = rotation_of(site.model, site.layer)
        return rotation.pairs, rotation.frequencies


@dataclass(frozen=True)
class KeyDiff(Evict):
    """Keys that are unlike the others stay (Park et al. 2025, arXiv 2504.15364); no query is looked at.

    A token's score is `-cos(k, m)`, where `m` is the mean of all keys' directions.

    Attributes:
        budget: tokens that stay a KV head, or a share of the prompt; or one for each layer.
        recent: the newest tokens, which stay: so many, or a share of the budget.
    """

    name: ClassVar[str] = "keydiff"
    reads_keys: ClassVar[bool] = True
    standard: ClassVar[tuple[str, ...]] = ("keydiff:budget=0.5", "keydiff:budget=0.25", "keydiff:budget=0.1")

    budget: Amount | Sequence[Amount] = 0.5
    recent: Amount = 0

    def _check(self) -> None:
        _amount("recent", self.recent, "a whole number of tokens, or a share of the budget from 0 to 1.0")

    def make(self, site: Site | None = None, floor: float | None = None) -> _kvpack.Eviction:
        """As the store knows it."""
        return _kvpack.Eviction.keydiff(self._common(site, floor, self.budget, self.recent))


@dataclass(frozen=True)
class L2Norm(KeyDiff):
    """Small keys stay: a token's score is `-|k|` (Devoto et al. 2024, arXiv 2406.11430); no query is looked at.

    The paper leaves the first two layers alone: `budget=(1.0, 1.0, 0.5, ...)`.

    Attributes:
        budget: tokens that stay a KV head, or a share of the prompt; or one for each layer.
        recent: the newest tokens, which stay: so many, or a share of the budget.
    """

    name: ClassVar[str] = "l2norm"
    standard: ClassVar[tuple[str, ...]] = ("l2norm:budget=0.5", "l2norm:budget=0.25", "l2norm:budget=0.1")

    def make(self, site: Site | None = None, floor: float | None = None) -> _kvpack.Eviction:
        """As the store knows it."""
        return _kvpack.Eviction.norm(self._common(site, floor, self.budget, self.recent))


@dataclass(frozen=True)
class Random(KeyDiff):
    """Lots decide: the control that every method has to beat.

    Attributes:
        budget: tokens that stay a KV head, or a share of the prompt; or one for each layer.
        recent: the newest tokens, which stay: so many, or a share of the budget.
        seed: of the lots.
    """

    name: ClassVar[str] = "random"
    reads_keys: ClassVar[bool] = False
    standard: ClassVar[tuple[str, ...]] = ("random:budget=0.5", "random:budget=0.25", "random:budget=0.1")

    seed: int = 0

    def _check(self) -> None:
        super()._check()
        check_whole(self, seed=0)

    def make(self, site: Site | None = None, floor: float | None = None) -> _kvpack.Eviction:
        """As the store knows it."""
        seed = self.seed + (0 if site is None else site.layer << 32)  # each layer has lots of its own
        return _kvpack.Eviction.random(self._common(site, floor, self.budget, self.recent), seed)


@dataclass(frozen=True, kw_only=True)
class AdaKV(Evict):
    """The heads of a layer share one budget (Feng et al. 2024, arXiv 2407.11550): `AdaKV(SnapKV(budget=0.25))`.

    The best tokens of all heads stay, as many as the heads' budgets have room for together; each head keeps at least
    its own best `floor * budget` ones. Heads then hold different numbers of tokens, and so many bytes. As text it is
    written with brackets: `adakv(snapkv:budget=0.25)`.

    Attributes:
        method: what scores the tokens; its own fields say what always stays, and whether the budget is held while
            decoding.
        floor: share of its own budget that a head keeps, 0 to 1.
    """

    name: ClassVar[str] = "adakv"
    standard: ClassVar[tuple[str, ...]] = ()

    method: Evict
    floor: float = 0.2

    def __init__(self, method: Evict, floor: float = 0.2) -> None:
        object.__setattr__(self, "method", method)
        object.__setattr__(self, "floor", floor)
        if not isinstance(method, Evict) or isinstance(method, AdaKV):
            raise OptionError(
                f"method={method!r} is not accepted; accepted: methods such as kvpack.SnapKV(budget=0.25)"
            )
        if isinstance(method, TOVA):
            raise OptionError(f"method={method!r} is not accepted: all heads of a layer keep the same tokens with it")
        if isinstance(floor, bool) or not isinstance(floor, int | float) or not 0 <= floor <= 1:
            raise OptionError(f"floor={floor!r} is not accepted; accepted: 0 to 1")
        for name in ("sinks", "protect", "decode", "block"):
            object.__setattr__(self, name, getattr(method, name))
        self.make()

    def __repr__(self) -> str:
        return f"AdaKV({self.method!r}, floor={self.floor!r})"

    def make(self, site: Site | None = None, floor: float | None = None) -> _kvpack.Eviction:
        """As the store knows it."""
        return self.method.make(site, self.floor if floor is None else floor)
