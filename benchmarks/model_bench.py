"""Measures the whole model with each of its caches. Runs in a worker, one for each dtype and number of threads."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kvpack
import torch
from kvpack.evaluation.contenders import Hqq, Quantized, Quanto
from kvpack.evaluation.peak import PeakMemory
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.utils import logging

from . import paths  # noqa: F401  # makes test_model importable

# isort: split
from test_model import document, test_model_path

# As much as generate's own chunks: larger ones would only cost memory.
CHUNK = 512
# The second step still pays for what the first one made.
WARM_UP_STEPS = 2


class NotInstalledError(ImportError):
    """A package that an engine needs."""


@dataclass(frozen=True)
class Engine:
    """One way to cache: the attention implementation that reads it, and how to make an empty one."""

    attention: str
    empty: Callable[[Any], Any]


def _packed(quantize: Any) -> Engine:
    return Engine("kvpack", lambda model: kvpack.PackedCache(model, quantize=quantize))


def _quantized(backend: type[Quantized]) -> Engine:
    def empty(model: Any) -> Any:
        if not backend.installed():
            raise NotInstalledError(backend.module)
        return backend(bits=4).new_cache(model)

    return Engine("sdpa", empty)


ENGINES = {
    "DynamicCache": Engine("sdpa", lambda model: DynamicCache(config=model.config)),
    "Exact": _packed(kvpack.Exact()),
    "KIVI-4": _packed(kvpack.KIVI(bits=4)),
    "KIVI-2": _packed(kvpack.KIVI(bits=2)),
    "HF hqq-4": _quantized(Hqq),
    "HF quanto-4": _quantized(Quanto),
}


class ModelBench:
    """The model, one full cache that grows, and the caches that are made from it."""

    def __init__(self, threads: int, dtype: str, turn_seconds: float = float("inf")) -> None:
        """Load the model; in a turn no step begins after `turn_seconds`."""
        torch.set_num_threads(threads)
        self.turn_seconds = turn_seconds
        logging.disable_progress_bar()
        folder = test_model_path()
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
        self.ids = _long_text(folder, self.model.config.max_position_embeddings)
        self.full = DynamicCache(config=self.model.config)
        self.caches: dict[str, Any] = {}

    def start(self, engine: str, tokens: int) -> None:
        """Make an engine's cache from the full one of `tokens`, and decode a few steps.

        All engines start from the same keys and values, those of an exact prefill. Its cache only grows: a later
        call must not ask for fewer tokens.
        """
        with torch.inference_mode():
            cache = ENGINES[engine].empty(self.model)
            self._grow(tokens)
            if isinstance(cache, kvpack.PackedCache):
                cache = kvpack.PackedCache.from_cache(self.full, self.model, quantize=cache.quantize)
            else:
                for index, layer in enumerate(self.full.layers):
                    cache.update(layer.keys, layer.values, index)
        self.caches[engine] = cache
        self.steps(engine, WARM_UP_STEPS)

    def steps(self, engine: str, count: int) -> list[float]:
        """Decode up to `count` tokens of the text; return the milliseconds of each."""
        cache, times = self.caches[engine], []
        self.model.set_attn_implementation(ENGINES[engine].attention)
        end = time.perf_counter() + self.turn_seconds
        with torch.inference_mode():
            while len(times) < count and (not times or time.perf_counter() < end):
                position = cache.get_seq_length()
                start = time.perf_counter()
                self._forward(cache, slice(position, position + 1))
                times.append(1e3 * (time.perf_counter() - start))
        return times

    def stop(self, engine: str) -> None:
        """Free an engine's cache."""
        self.caches.pop(engine, None)

    def prefill(self, engine: str, tokens: int) -> dict[str, Any]:
        """Read a prompt of `tokens` at once into a new cache, as generate does.

        Returns:
            `seconds`, and `peak_bytes`: the most memory that the process had meanwhile above what it had before;
            None where the system does not let the peak be reset.
        """
        self.model.set_attn_implementation(ENGINES[engine].attention)
        with torch.inference_mode():
            self._forward(ENGINES[engine].empty(self.model), slice(0, 64))  # so that the threads are awake
            with PeakMemory() as peak:
                cache = ENGINES[engine].empty(self.model)
                start = time.perf_counter()
                self._forward(cache, slice(0, tokens))
                seconds = time.perf_counter() - start
        return {"seconds": seconds, "peak_bytes": peak.bytes}

    def layers(self) -> int:
        """Return the number of layers."""
        return self.model.config.num_hidden_layers

    def token_ids(self) -> list[int]:
        """Return the text's token ids, for engines that live elsewhere."""
        return self.ids[0].tolist()

    def _grow(self, tokens: int) -> None:
        """Read the text up to `tokens` into the full cache, unless it holds them already."""
        self.model.set_attn_implementation("sdpa")
        for first in range(self.full.get_seq_length(), tokens, CHUNK):
            self._forward(self.full, slice(first, min(first + CHUNK, tokens)))

    def _forward(self, cache: Any, which: slice) -> None:
        ids = self.ids[:, which]
        self.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)


def _long_text(folder: Path, tokens: int) -> torch.Tensor:
    """Return `[1, tokens]` ids: the document over and over."""
    ids = AutoTokenizer.from_pretrained(folder)(document(), return_tensors="pt", verbose=False).input_ids
    return ids.repeat(1, -(-tokens // ids.shape[1]))[:, :tokens]
