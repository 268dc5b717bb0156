"""What the demo measures: time per decoded token, bytes held, distance from the full cache's answers."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import kvpack
import torch
from kvpack.forward import CACHE_ARGUMENT
from transformers import DynamicCache, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

FULL = "DynamicCache"
EMPTY = "empty cache"
Advance = Callable[[], None]


@dataclass(frozen=True)
class Engine:
    """One way of caching: its name, the attention implementation, the codec (None: DynamicCache)."""

    name: str
    attention: str
    quantize: Any = None

    def new_cache(self, model: PreTrainedModel) -> Any:
        """Return an empty cache for `model`."""
        if self.quantize is None:
            return DynamicCache(config=model.config)
        return kvpack.PackedCache(model, quantize=self.quantize)


ENGINES = (
    Engine(FULL, "sdpa"),
    *(
        Engine(f"kvpack {name}", "kvpack", kvpack.presets[name])
        for name in ("lossless", "near-lossless", "balanced", "tiny")
    ),
)


@dataclass
class Spread:
    """Median, 10th and 90th percentile of a series."""

    median: float
    p10: float
    p90: float

    @classmethod
    def of(cls, series: Sequence[float]) -> Spread:
        """Return the spread of `series`, which has at least two values."""
        deciles = statistics.quantiles(series, n=10, method="inclusive")
        return cls(statistics.median(series), deciles[0], deciles[-1])


@dataclass
class Result:
    """Everything measured on one engine."""

    name: str
    bytes_held: int = 0
    parts: dict[str, int] = field(default_factory=dict)
    step_ms: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    same_top_token: int = 0
    calls: dict[str, int] = field(default_factory=dict)
    first_token_s: list[float] = field(default_factory=list)
    generated: list[int] = field(default_factory=list)


@dataclass
class Forced:
    """The teacher-forced run: a result for every engine, and the times of steps with nothing cached."""

    results: dict[str, Result]
    empty_ms: list[float]
    prompt_tokens: int
    steps: int

    @property
    def tokens_held(self) -> int:
        """Tokens in each cache when its bytes were counted."""
        return self.prompt_tokens + self.steps


@torch.no_grad()
def prefill(model: PreTrainedModel, prompt: torch.Tensor, advance: Advance) -> tuple[DynamicCache, torch.Tensor]:
    """Fill a DynamicCache with the prompt, calling `advance` after every layer; return it and the logits."""
    model.set_attn_implementation("sdpa")
    cache = DynamicCache(config=model.config)
    hooks = [layer.register_forward_hook(lambda *_: advance()) for layer in attention_layers(model)]
    try:
        logits = model(input_ids=prompt, use_cache=True, logits_to_keep=1, **{CACHE_ARGUMENT: cache}).logits[0, -1]
    finally:
        for hook in hooks:
            hook.remove()
    return cache, logits


def attention_layers(model: PreTrainedModel) -> list[torch.nn.Module]:
    """Return the attention modules of `model`: the ones that know which layer of the cache is theirs."""
    return [module for module in model.modules() if isinstance(getattr(module, "layer_idx", None), int)]


@torch.no_grad()
def teacher_forced(
    model: PreTrainedModel,
    full: DynamicCache,
    logits: torch.Tensor,
    steps: int,
    seed: int,
    advance: Advance,
) -> Forced:
    """Decode the full cache's greedy tokens with every engine, one step of each in turn.

    At every step all engines read the same token, each with its own cache, in an order shuffled anew: so the
    machine's noise meets all of them alike, and the ratio of two engines can be taken within a step.

    Args:
        model: its attention implementation is switched between the steps, outside the measured time.
        full: the cache that holds the prompt; the packed caches are made from it.
        logits: the model's output at the prompt's last token.
        steps: how many tokens to decode.
        seed: of the order of the engines.
        advance: called after every step of an engine.
    """
    prompt_tokens = full.get_seq_length()
    caches = {
        engine.name: full
        if engine.quantize is None
        else kvpack.PackedCache.from_cache(full, model, quantize=engine.quantize)
        for engine in ENGINES
    }
    results = {engine.name: Result(engine.name) for engine in ENGINES}
    empty_ms: list[float] = []
    order = [*ENGINES, Engine(EMPTY, "sdpa")]
    shuffler = random.Random(seed)

    for _ in range(steps):
        token = logits.argmax().view(1, 1)
        shuffler.shuffle(order)
        outputs = {}
        for engine in order:
            empty = engine.name == EMPTY
            model.set_attn_implementation(engine.attention)
            cache = engine.new_cache(model) if empty else caches[engine.name]
            start = time.perf_counter()
            output = model(input_ids=token, use_cache=True, **{CACHE_ARGUMENT: cache}).logits[0, -1]
            elapsed = 1e3 * (time.perf_counter() - start)
            if empty:
                empty_ms.append(elapsed)
            else:
                results[engine.name].step_ms.append(elapsed)
                outputs[engine.name] = output
            advance()
        logits = outputs[FULL]
        for name, output in outputs.items():
            results[name].kl.append(kl_divergence(logits, output))
            results[name].same_top_token += int(output.argmax() == logits.argmax())

    for engine in ENGINES:
        describe(results[engine.name], caches[engine.name])
    return Forced(results, empty_ms, prompt_tokens, steps)


def kl_divergence(full: torch.Tensor, other: torch.Tensor) -> float:
    """Return KL(full || other) of the next token's distributions, in nats."""
    p, q = (torch.log_softmax(logits.double(), dim=-1) for logits in (full, other))
    return max(0.0, float((p.exp() * (p - q)).sum()))


def describe(result: Result, cache: Any) -> None:
    """Write down what `cache` holds and, if it is packed, which paths its attention took."""
    if isinstance(cache, kvpack.PackedCache):
        memory = cache.memory()
        result.bytes_held, result.parts = memory.total, dict(memory.parts)
        info = cache.info()
        result.calls = {path: info[path] for path in ("fused", "materialised", "prefill")}
    else:
        tensors = (tensor for layer in cache.layers for tensor in (layer.keys, layer.values))
        result.bytes_held = sum(tensor.untyped_storage().nbytes() for tensor in tensors)
        result.parts = {"keys and values": result.bytes_held}


class FirstToken(BaseStreamer):  # type: ignore[misc]
    """Follows `generate`: the seconds until the first token."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.seconds = 0.0
        self.tokens = -1  # generate hands over the prompt first

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt, then each token."""
        self.tokens += 1
        if self.tokens == 1:
            self.seconds = time.perf_counter() - self.start

    def end(self) -> None:
        """Nothing is left to do."""


def generate(
    model: PreTrainedModel,
    engine: Engine,
    prompt: torch.Tensor,
    tokens: int,
    result: Result,
) -> None:
    """Generate greedily from the bare prompt, as a user does, into a new cache of `engine`."""
    model.set_attn_implementation(engine.attention)
    first = FirstToken()
    output = model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        **{CACHE_ARGUMENT: engine.new_cache(model)},
        max_new_tokens=tokens,
        do_sample=False,
        streamer=first,
    )
    result.generated = output[0, prompt.shape[1] :].tolist()
    result.first_token_s.append(first.seconds)
