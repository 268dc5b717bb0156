"""The `quantize` family: fewer bits a number."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from .. import _kvpack
from ..errors import OptionError
from .feedback import GPTQ, checked

if TYPE_CHECKING:
    from .evict import Evict
    from .select import Select


@dataclass(frozen=True)
class Site:
    """The attention layer of a model for which a codec makes a store.

    Attributes:
        layer: its number.
        layers: how many layers the model has.
        config: the configuration of the model's decoder.
        model: the model, where the cache was made for one and not for a configuration.
    """

    layer: int
    layers: int
    config: Any
    model: Any = None


class Quantize(ABC):
    """A codec: how tokens that have left the exact tail are stored.

    Attributes:
        name: in the registry, and in methods written as text (`kivi:bits=2`).
        standard: settings, as text, at which it is measured beside others.
    """

    name: ClassVar[str]
    standard: ClassVar[tuple[str, ...]]

    @abstractmethod
    def keys_method(self, site: Site | None = None) -> _kvpack.Method:
        """How keys are stored in a layer; without a site what is the same in all layers."""

    @abstractmethod
    def values_method(self, site: Site | None = None) -> _kvpack.Method:
        """How values are stored in a layer; without a site what is the same in all layers."""

    @property
    def needs_neighbours(self) -> bool:
        """Whether keys are held in runs of consecutive positions, so that none of them can go."""
        return False

    def centers(self, site: Site | None = None) -> bool:
        """Whether a layer's keys are held less their mean."""
        return False

    def make_layer(
        self, site: Site | None = None, evict: Evict | None = None, select: Select | None = None
    ) -> _kvpack.Layer:
        """How a layer stores its tokens, which of them stay, and which a step of decoding reads."""
        return _kvpack.Layer(
            self.keys_method(site),
            self.values_method(site),
            None if evict is None else evict.make(site),
            None if select is None else select.make(site),
            select is not None,
            self.centers(site),
        )


def check_whole(method: object, **least: int) -> None:
    """Raises OptionError for the first field that is no whole number from its least value on."""
    for name, low in least.items():
        value = getattr(method, name)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value < 2**31:
            raise OptionError(f"{name}={value!r} is not accepted; accepted: whole numbers from {low}")


def check_bits(method: Quantize, field: str, accepted: tuple[int, ...]) -> None:
    """Raises OptionError when a field is none of the accepted widths."""
    value = getattr(method, field)
    if isinstance(value, bool) or value not in accepted:
        raise OptionError(f"{field}={value!r} is not accepted; accepted: {', '.join(map(str, accepted))}")


def check_switch(method: object, name: str) -> None:
    """Raises OptionError when a field is not True or False."""
    value = getattr(method, name)
    if not isinstance(value, bool):
        raise OptionError(f"{name}={value!r} is not accepted; accepted: True, False")


@dataclass(frozen=True)
class Exact(Quantize):
    """Lossless: keys and values stay in the model's dtype."""

    name: ClassVar[str] = "exact"
    standard: ClassVar[tuple[str, ...]] = ("exact",)

    def keys_method(self, site: Site | None = None) -> _kvpack.Method:
        """As the model made them."""
        return _kvpack.Method.exact()

    values_method = keys_method


class _Fed(Quantize):
    """A codec whose keys and values are stored alike, with feedback or without."""

    feedback: GPTQ | None

    @abstractmethod
    def _method(self) -> _kvpack.Method:
        """How both are stored, without feedback."""

    def keys_method(self, site: Site | None = None) -> _kvpack.Method:
        """How keys are stored, with the feedback of their queries."""
        return self._method() if self.feedback is None else self.feedback.for_keys(self._method(), site)

    def values_method(self, site: Site | None = None) -> _kvpack.Method:
        """How values are stored, with the feedback of the layer's output projection."""
        return self._method() if self.feedback is None else self.feedback.for_values(self._method(), site)


@dataclass(frozen=True)
class KIVI(_Fed):
    """Asymmetric quantisation, keys per channel and values per token (Liu et al. 2024, arXiv 2402.02750).

    A group shares a scale and a zero-point, both float16: `zero = min`, `scale = (max - min) / (2^bits - 1)`,
    `code = round((x - zero) / scale)`. That makes `bits + 32 / group` bits a number.

    Keys are packed in blocks of `window` tokens as soon as one is full, so that fewer than `window` of the newest stay
    exact, at times none; values one by one as soon as `window` newer ones are held. Keys are quantised as they are
    attended to, after RoPE.

    Attributes:
        bits: bits of a code: 2, 3, 4 or 8. The paper has 2 and 4; its authors advise 4 for models with
            grouped-query attention.
        group: numbers that share a scale: tokens of a key channel, channels of a value token. A multiple of 8, at
            most 256 and at most the head dim. The last group of a value may be shorter.
        window: the paper's residual length, in tokens; a multiple of `group`.
        sinks: tokens at the beginning of each sequence that stay exact, not counting pads. The paper has none (0).
        feedback: `GPTQ(...)`, if roundings are to make up for each other (`feedback=gptq` as text); None: they are not.
        full_window: whether a block of keys waits until `window` newer ones are held, too: `window` to `2 window - 1`
            of the newest stay exact. The paper's rule is False.
    """

    name: ClassVar[str] = "kivi"
    standard: ClassVar[tuple[str, ...]] = (
        "kivi:bits=8",
        "kivi:bits=8:group=64",
        "kivi:bits=8:group=64:feedback=gptq",
        "kivi:bits=4",
        "kivi:bits=3",
        "kivi:bits=3:feedback=gptq",
        "kivi:bits=2",
    )

    bits: int = 4
    group: int = 32
    window: int = 128
    sinks: int = 4
    feedback: GPTQ | None = None
    full_window: bool = False

    def __post_init__(self) -> None:
        check_whole(self, bits=1, group=1, window=1, sinks=0)
        check_bits(self, "bits", (2, 3, 4, 8))
        check_switch(self, "full_window")
        object.__setattr__(self, "feedback", checked(self.feedback))
        self._method()  # Rust knows the rest of the rules

    def _method(self) -> _kvpack.Method:
        method = _kvpack.Method.kivi(self.bits, self.group, self.window, self.sinks)
        return method.with_full_window() if self.full_window else method


@dataclass(frozen=True)
class _Block(_Fed):
    bits: ClassVar[int]

    window: int = 0
    sinks: int = 0
    feedback: GPTQ | None = None

    def __post_init__(self) -> None:
        check_whole(self, window=0, sinks=0)
        object.__setattr__(self, "feedback", checked(self.feedback))

    def _method(self) -> _kvpack.Method:
        return _kvpack.Method.block(self.bits, self.window, self.sinks)


@dataclass(frozen=True)
class Q8(_Block):
    """Blocks of 32 channels with a float16 scale, 8.5 bits a number, as llama.cpp's `q8_0`.

    `scale = max |x| / 127`, `code = round(x / scale)`. Per token, so nothing has to wait: near-lossless anywhere.

    Attributes:
        window: newest tokens that stay exact.
        sinks: tokens at the beginning of each sequence that stay exact, not counting pads.
        feedback: `GPTQ(...)`, if roundings are to make up for each other (`feedback=gptq` as text); None: they are not.
    """

    name: ClassVar[str] = "q8"
    standard: ClassVar[tuple[str, ...]] = ("q8",)
    bits: ClassVar[int] = 8


@dataclass(frozen=True)
class Q4(_Block):
    """Blocks of 32 channels with a float16 scale, 4.5 bits a number, as llama.cpp's `q4_0`.

    `scale = x / -8` for the `x` of the largest magnitude, `code = min(15, floor(x / scale + 8.5))`.

    Attributes:
        window: newest tokens that stay exact.
        sinks: tokens at the beginning of each sequence that stay exact, not counting pads.
        feedback: `GPTQ(...)`, if roundings are to make up for each other (`feedback=gptq` as text); None: they are not.
    """

    name: ClassVar[str] = "q4"
    standard: ClassVar[tuple[str, ...]] = ("q4",)
    bits: ClassVar[int] = 4


@dataclass(frozen=True)
class Rotated(_Fed):
    """A randomised Hadamard transform, then one scale a token and a uniform grid.

    The rotation and the scale a token are TurboQuant-MSE's (Zandieh et al. 2025, arXiv 2504.19874). The paper has Lloyd
    and Max's levels, `levels="lloyd-max"`; a uniform grid, the default, is faster. The paper's second stage (QJL) is
    left out. The stored scale is such that `x' . x = x . x`: attention averages errors away, but not what all tokens
    lack. `bits + 16 / group` bits a number.

    Queries are rotated once a step and outputs once, tokens never.

    Attributes:
        bits: bits of a code: 2, 3, 4 or 8.
        levels: "uniform", or "lloyd-max" (2, 3 or 4 bits): the levels of least square error for normal numbers.
        group: numbers that share a scale, after the rotation: a multiple of 16 up to 256, or 0 for the whole head dim.
        window: newest tokens that stay exact.
        sinks: tokens at the beginning of each sequence that stay exact, not counting pads.
        seed: of the random signs.
        feedback: `GPTQ(...)`, if roundings are to make up for each other (`feedback=gptq` as text); None: they are not.
        center: whether keys are held less the mean key of the first prompt, one a KV head. Attention does not change
            when all keys move by the same vector, and what is left is smaller, and rounded better. Not for models with
            learned sinks or capped logits, nor with evictions that look at keys.
    """

    name: ClassVar[str] = "rotated"
    standard: ClassVar[tuple[str, ...]] = (
        "rotated:bits=4",
        "rotated:bits=4:feedback=gptq",
        "rotated:bits=4:center=True",
        "rotated:bits=3",
        "rotated:bits=3:levels=lloyd-max",
        "kivi:bits=4:group=128/rotated:bits=2",
    )

    bits: int = 4
    levels: str = "uniform"
    group: int = 0
    window: int = 128
    sinks: int = 4
    seed: int = 0
    feedback: GPTQ | None = None
    center: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "feedback", checked(self.feedback))
        check_switch(self, "center")
        check_whole(self, bits=1, group=0, window=0, sinks=0, seed=0)
        check_bits(self, "bits", (2, 3, 4, 8))
        if self.levels not in ("uniform", "lloyd-max"):
            raise OptionError(f"levels={self.levels!r} is not accepted; accepted: 'uniform', 'lloyd-max'")
        self._method()

    def centers(self, site: Site | None = None) -> bool:
        """Whether a layer's keys are held less their mean."""
        return self.center

    def _method(self) -> _kvpack.Method:
        return _kvpack.Method.rotated(self.bits, self.levels, self.group, self.window, self.sinks, self.seed)


@dataclass(frozen=True)
class Graded(Quantize):
    """Keys per channel, each with the bits that it is worth; values rotated. kvpack's own combination, no calibration.

    A key channel has 8, 4, 3, 2 or 0 bits, such that `sum_c E[q_c^2] E[e_c^2]`, the expected square of a logit's error,
    is least while the mean is at most `key_bits`: a rate allocation on KIVI's grids, with the query metric that SQuat,
    ThinK and Block-GTQ use too. The queries are those that the cache sees while the text is read; only
    with `attn_implementation="kvpack"` are they seen, otherwise all channels' errors weigh the same. Bits are chosen
    again when the tokens have doubled. Values are stored as `Rotated` stores them.

    Bits a number, without the exact window: `key_bits + 32 / group` for keys, `value_bits + 16 / head_dim` for values.

    Attributes:
        key_bits: mean bits of a key's code, 1 to 8, in fractions too.
        value_bits: bits of a value's code: 2, 3, 4 or 8.
        group: tokens of a key channel that share a scale: a multiple of 8, at most 256.
        window: newest values that stay exact, a multiple of `group`. Keys are packed in blocks of it as soon as one is
            full: fewer of the newest stay exact, at times none.
        sinks: tokens at the beginning of each sequence that stay exact, not counting pads.
        seed: of the values' random signs.
        feedback: `GPTQ(...)`, if roundings are to make up for each other (`feedback=gptq` as text); None: they are not.
        full_window: whether a block of keys waits until `window` newer ones are held, too: `window` to `2 window - 1`
            of the newest stay exact.
    """

    name: ClassVar[str] = "graded"
    standard: ClassVar[tuple[str, ...]] = (
        "graded:key_bits=8:value_bits=8",
        "graded:key_bits=4.5:value_bits=4",
        "graded:key_bits=3.5:value_bits=4",
        "graded:key_bits=3:value_bits=3",
        "graded:key_bits=3:value_bits=2",
        "graded:key_bits=2.5:value_bits=2",
        "graded:key_bits=2:value_bits=2",
    )

    key_bits: float = 3.0
    value_bits: int = 3
    group: int = 128
    window: int = 128
    sinks: int = 4
    seed: int = 0
    feedback: GPTQ | None = None
    full_window: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "feedback", checked(self.feedback))
        check_switch(self, "full_window")
        if not isinstance(self.key_bits, int | float) or isinstance(self.key_bits, bool):
            raise OptionError(f"key_bits={self.key_bits!r} is not accepted; accepted: 1 to 8")
        if not 1 <= self.key_bits <= 8:
            raise OptionError(f"key_bits={self.key_bits!r} is not accepted; accepted: 1 to 8")
        check_whole(self, value_bits=1, group=1, window=1, sinks=0, seed=0)
        check_bits(self, "value_bits", (2, 3, 4, 8))
        self.make_layer()

    def keys_method(self, site: Site | None = None) -> _kvpack.Method:
        """Per channel, with graded bits."""
        method = _kvpack.Method.graded(self.key_bits, self.group, self.window, self.sinks)
        method = method.with_full_window() if self.full_window else method
        return method if self.feedback is None else self.feedback.for_keys(method, site)

    def values_method(self, site: Site | None = None) -> _kvpack.Method:
        """Rotated."""
        method = _kvpack.Method.rotated(self.value_bits, "uniform", 0, self.window, self.sinks, self.seed)
        return method if self.feedback is None else self.feedback.for_values(method, site)


@dataclass(frozen=True)
class KVarN(Quantize):
    """Variance-normalised blocks (Muller et al. 2026, arXiv 2606.03458); no calibration.

    Blocks of 128 tokens are rotated as in `Rotated`; then rows (tokens) and columns (channels) are divided in turn by
    their standard deviations until all are the same. What is left is rounded on asymmetric grids: of keys one a
    channel, of values one a token, with float16 scale and zero-point. A factor a token for keys, a factor a channel for
    values (float16) are stored beside; the other factors are in the grids. `bits + 32 / 128 + 16 / head_dim` bits a
    number of keys,
    `bits + 32 / head_dim + 16 / 128` of values. A block is packed as soon as it is full: fewer than 128 of the newest
    tokens stay exact, at times none.

    Attributes:
        bits: bits of a code: 2, 3, 4 or 8. The paper has 2; its implementation 4 for keys, `kvarn:bits=4/kvarn:bits=2`.
        sinks: tokens at the beginning of each sequence that stay exact, not counting pads.
        seed: of the random signs.
        full_window: whether a block waits until 128 newer tokens are held, too: 128 to 255 of the newest stay exact.
            The paper's rule is False.
    """

    name: ClassVar[str] = "kvarn"
    standard: ClassVar[tuple[str, ...]] = (
        "kvarn:bits=8",
        "kvarn:bits=4",
        "kvarn:bits=3",
        "kvarn:bits=4/kvarn:bits=2",
        "kvarn:bits=2",
    )

    bits: int = 2
    sinks: int = 4
    seed: int = 0
    full_window: bool = False

    def __post_init__(self) -> None:
        check_whole(self, bits=1, sinks=0, seed=0)
        check_switch(self, "full_window")
        check_bits(self, "bits", (2, 3, 4, 8))
        self.keys_method()

    def keys_method(self, site: Site | None = None) -> _kvpack.Method:
        """Per channel, with a factor a token."""
        method = _kvpack.Method.kvarn(self.bits, self.sinks, self.seed)
        return method.with_full_window() if self.full_window else method

    values_method = keys_method  # per token, with a factor a channel


@dataclass(frozen=True)
class Apart(Quantize):
    """Keys by one method, values by another: `Apart(KIVI(bits=4), Rotated(bits=2))`.

    As text it is written with a slash: `kivi:bits=4/rotated:bits=2`.

    Attributes:
        keys: the codec as which keys are stored.
        values: the codec as whose values values are stored.
    """

    name: ClassVar[str] = "apart"
    standard: ClassVar[tuple[str, ...]] = ()

    keys: Quantize
    values: Quantize

    def __post_init__(self) -> None:
        for side in ("keys", "values"):
            given = getattr(self, side)
            if not isinstance(given, Quantize):
                raise OptionError(f"{side}={given!r} is not accepted; accepted: methods such as kvpack.KIVI(bits=4)")

    @property
    def needs_neighbours(self) -> bool:
        """As the codec of keys."""
        return self.keys.needs_neighbours

    def centers(self, site: Site | None = None) -> bool:
        """As the codec of keys."""
        return self.keys.centers(site)

    def keys_method(self, site: Site | None = None) -> _kvpack.Method:
        """That of `keys`."""
        return self.keys.keys_method(site)

    def values_method(self, site: Site | None = None) -> _kvpack.Method:
        """That of `values`."""
        return self.values.values_method(site)


@dataclass(frozen=True)
class Layers(Quantize):
    """Some layers by another codec than the rest: `Layers(KIVI(bits=2), {0: Q8(), -1: Q8()})`.

    The first and the last layers of many models need more bits than the others. As text it is written with `@`:
    `kivi:bits=2@0=q8@-1=q8`.

    Attributes:
        default: the codec of all layers that are not named.
        others: codecs by the number of the layer; negative numbers count from the last one.
    """

    name: ClassVar[str] = "layers"
    standard: ClassVar[tuple[str, ...]] = ()

    default: Quantize
    others: Mapping[int, Quantize] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if not isinstance(self.others, Mapping):
            raise OptionError(f"others={self.others!r} is not accepted; accepted: codecs by the number of the layer")
        for layer, codec in ((None, self.default), *self.others.items()):
            if not isinstance(codec, Quantize):
                where = "default" if layer is None else f"layer {layer}"
                raise OptionError(f"{where}: {codec!r} is not accepted; accepted: methods such as kvpack.KIVI(bits=4)")
            if layer is not None and (not isinstance(layer, int) or isinstance(layer, bool)):
                raise OptionError(f"others: {layer!r} is not accepted; accepted: whole numbers of layers")

    @property
    def needs_neighbours(self) -> bool:
        """As any of the codecs."""
        return any(codec.needs_neighbours for codec in (self.default, *self.others.values()))

    def codec(self, site: Site | None) -> Quantize:
        """The codec of a layer.

        Raises:
            OptionError: a number is none of the model's, or two numbers are the same layer.
        """
        if site is None:
            return self.default
        if beyond := [layer for layer in self.others if not -site.layers <= layer < site.layers]:
            raise OptionError(
                f"others: layers {beyond} are not accepted; accepted: -{site.layers} to {site.layers - 1}"
            )
        by_number = {layer % site.layers: codec for layer, codec in self.others.items()}
        if len(by_number) < len(self.others):
            raise OptionError(f"others: {list(self.others)} name a layer twice in a model of {site.layers} layers")
        return by_number.get(site.layer, self.default)

    def centers(self, site: Site | None = None) -> bool:
        """As the layer's codec; without a site as any."""
        codecs = (self.default, *self.others.values()) if site is None else (self.codec(site),)
        return any(codec.centers(site) for codec in codecs)

    def keys_method(self, site: Site | None = None) -> _kvpack.Method:
        """That of the layer."""
        return self.codec(site).keys_method(site)

    def values_method(self, site: Site | None = None) -> _kvpack.Method:
        """That of the layer."""
        return self.codec(site).values_method(site)
