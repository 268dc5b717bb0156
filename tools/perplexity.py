"""Streaming perplexity: how much worse a model predicts a text when its past is read from a packed cache.

    python tools/perplexity.py --text FILE --tokens 16384 --context 2048 --chunk 128 \
        --methods exact,kivi8,kivi4,kivi3,kivi2 --hf hqq4,hqq2,quanto4

The text's first `--tokens` tokens are cut into windows of `--context`. Each window is fed in chunks of `--chunk`
through an empty cache, so that every token is predicted from a past that the cache has already compressed. The
full cache (transformers' DynamicCache) is measured on the same tokens; `--hf` adds transformers' QuantizedCache with
the same group and residual length, where its backend is installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import kvpack
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, QuantizedCache

GROUP = 32
WINDOW = 128
BACKENDS = {"hqq": "hqq", "quanto": "optimum.quanto"}


@dataclass(frozen=True)
class Method:
    """A way to keep the past: its cache, and the attention implementation that reads it."""

    name: str
    attention: str
    new_cache: Callable[[Any], Any]


@dataclass
class Result:
    """What one method scored on all windows."""

    name: str
    nll: float = 0.0
    tokens: int = 0
    seconds: float = 0.0
    cache_bytes: int = 0

    @property
    def perplexity(self) -> float:
        """The exp of the mean negative log-likelihood in nats."""
        return math.exp(self.nll / self.tokens)


def packed_method(name: str) -> Method:
    """`exact`, or `kivi` with its bits behind it."""
    bits = re.fullmatch(r"kivi(\d+)", name)
    if bits:
        codec: Any = kvpack.KIVI(bits=int(bits[1]), group=GROUP, window=WINDOW)
    elif name == "exact":
        codec = kvpack.Exact()
    else:
        raise SystemExit(f"--methods: given {name!r}, expected exact, kivi2, kivi3, kivi4 or kivi8")
    return Method(name, "kvpack", lambda model: kvpack.PackedCache(model, quantize=codec))


def transformers_method(name: str) -> Method | None:
    """A backend of transformers' QuantizedCache with its bits behind it; None where it is not installed."""
    match = re.fullmatch(rf"({'|'.join(BACKENDS)})(\d+)", name)
    if not match:
        raise SystemExit(f"--hf: given {name!r}, expected one of {', '.join(BACKENDS)} with the bits behind it")
    backend, bits = match[1], int(match[2])
    if importlib.util.find_spec(BACKENDS[backend].partition(".")[0]) is None:
        return None
    axis = {"hqq": 1, "quanto": 0}[backend]  # what each backend's own layer works best with
    options = {"nbits": bits, "q_group_size": GROUP, "residual_length": WINDOW, "axis_key": axis, "axis_value": axis}
    return Method(f"transformers {name}", "sdpa", lambda model: QuantizedCache(backend, model.config, **options))


def full_method() -> Method:
    """The full cache that all others are compared with."""
    return Method("full", "sdpa", lambda model: DynamicCache(config=model.config))


def streaming_nll(model: Any, cache: Any, ids: torch.Tensor, chunk: int) -> tuple[float, int]:
    """Sum of the negative log-likelihoods of `ids` [n] after the first, and their number, fed `chunk` at a time."""
    total = 0.0
    for first in range(0, len(ids) - 1, chunk):
        last = min(first + chunk, len(ids) - 1)
        logits = model(ids[None, first:last], past_key_values=cache, use_cache=True).logits[0]
        total += torch.nn.functional.cross_entropy(logits.double(), ids[first + 1 : last + 1], reduction="sum").item()
    return total, len(ids) - 1


def evaluate(
    model: Any, ids: torch.Tensor, methods: list[Method], context: int, chunk: int
) -> Iterator[tuple[int, dict[str, Result]]]:
    """Feeds window after window to every method; yields the steps done and the results so far after each."""
    results = {method.name: Result(method.name) for method in methods}
    windows = ids[: len(ids) // context * context].split(context)
    with torch.inference_mode():
        for index, window in enumerate(windows):
            for number, method in enumerate(methods):
                model.set_attn_implementation(method.attention)
                cache = method.new_cache(model)
                start = time.perf_counter()
                nll, tokens = streaming_nll(model, cache, window, chunk)
                result = results[method.name]
                result.seconds += time.perf_counter() - start
                result.nll += nll
                result.tokens += tokens
                result.cache_bytes = held_bytes(cache)
                yield index * len(methods) + number + 1, results


def held_bytes(cache: Any) -> int:
    """Bytes of the cache; 0 where it cannot tell."""
    if isinstance(cache, kvpack.PackedCache):
        return cache.memory().total
    if isinstance(cache, QuantizedCache):
        return 0
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def table(results: dict[str, Result]) -> str:
    """The results beside the full cache's."""
    full = results["full"]
    lines = [f"{'method':20} {'perplexity':>11} {'worse by':>9} {'of full bytes':>14} {'seconds':>8}"]
    for result in results.values():
        worse = result.perplexity / full.perplexity - 1
        size = f"{result.cache_bytes / full.cache_bytes:.1%}" if result.cache_bytes else "-"
        lines.append(f"{result.name:20} {result.perplexity:11.4f} {worse:9.2%} {size:>14} {result.seconds:8.1f}")
    return "\n".join(lines)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="a text file in UTF-8")
    parser.add_argument("--model", type=Path, help="the folder of a saved model (default: the test model)")
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--chunk", type=int, default=128)
    parser.add_argument("--methods", default="exact,kivi8,kivi4,kivi3,kivi2")
    parser.add_argument("--hf", default="", help="transformers' own caches, such as hqq4,hqq2,quanto4")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    return parser.parse_args(arguments)


def main() -> None:
    """Measures and prints."""
    options = parse()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if options.model is None:
        import test_model

        options.model = test_model.test_model_path()
    methods = [full_method(), *map(packed_method, options.methods.split(","))]
    for name in filter(None, options.hf.split(",")):
        method = transformers_method(name)
        if method is None:
            print(f"{name}: its backend is not installed, left out", file=sys.stderr)
        else:
            methods.append(method)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    text = options.text.read_text(encoding="utf-8")
    # A token is rarely longer than eight characters: no need to tokenise a whole book.
    ids = tokenizer(text[: options.tokens * 8], return_tensors="pt")["input_ids"][0][: options.tokens]
    if len(ids) < options.tokens or options.tokens < options.context:
        raise SystemExit(f"--tokens {options.tokens}: the text has {len(ids)}, and --context is {options.context}")
    steps = len(ids) // options.context * len(methods)
    results: dict[str, Result] = {}
    for done, so_far in evaluate(model, ids, methods, options.context, options.chunk):
        results = so_far
        print(f"\r{done}/{steps} windows", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    print(
        f"{options.text.name}: {len(ids)} tokens in windows of {options.context}, chunks of {options.chunk}; "
        f"{options.model.name} float32, {torch.get_num_threads()} threads, {kvpack.info()['isa']}"
    )
    print(table(results))
    if options.json:
        numbers = [{**asdict(result), "perplexity": result.perplexity} for result in results.values()]
        options.json.write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
