"""Measures attention of one layer, all engines by turns. Runs in a worker, one for each number of threads."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import kvpack
import torch
from kvpack._kvpack import Cache
from kvpack.evaluation.peak import return_free_memory
from kvpack.layer import PackedLayer
from kvpack.methods import Methods
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from .measure import interleaved, spread
from .results import Row

# Bytes that the layers of one engine hold together, at least: several times what the last cache level does.
WORKING_SET = 128 << 20
# A layer of this size drives itself out of every cache level, so that one is enough.
LARGE_LAYER = 512 << 20
PROBE_FLOATS = 128 << 20
# Shorter samples would measure the clock.
SAMPLE_NS = 2e6
# The lossless engine in float32 must agree with torch, or something else is measured than attention.
TOLERANCE = 1e-4
REFERENCE = "torch SDPA float32"


class Layer(Protocol):
    """Keys and values of one layer, as one engine holds them."""

    @property
    def nbytes(self) -> int:
        """Bytes held."""

    def attend(self, query: Tensor) -> Tensor:
        """Return `[1, Hq, q, D]` for the queries `[1, Hq, q, D]` of the newest tokens."""


class TorchLayer:
    """Raw keys and values, read by torch."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values
        self._mask: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.keys.nbytes + self.values.nbytes

    def attend(self, query: Tensor) -> Tensor:
        """Attention; with many queries under a causal mask, which is made once."""
        return self._sdpa(query, self.keys, self.values)

    def _sdpa(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        new, tokens = query.shape[2], keys.shape[2]
        if new > 1 and self._mask is None:
            self._mask = torch.ones((new, tokens), dtype=torch.bool).tril(tokens - new)
        return scaled_dot_product_attention(query, keys, values, attn_mask=self._mask, enable_gqa=True)


class DynamicLayer(TorchLayer):
    """As DynamicCache does it: every step copies the whole cache to append the new token."""

    def attend(self, query: Tensor) -> Tensor:
        """Attention over what is held and a token more."""
        new = slice(-1, None)
        keys = torch.cat([self.keys, self.keys[:, :, new]], dim=-2)
        values = torch.cat([self.values, self.values[:, :, new]], dim=-2)
        return self._sdpa(query, keys, values)


class KvpackLayer:
    """Packed keys and values."""

    def __init__(self, keys: Tensor, values: Tensor, quantize: Any, select: Any = None) -> None:
        methods = Methods(quantize, select=select)
        store = Cache([methods.make_layer()], [False], 0, True)
        self._layer = PackedLayer(store, 0, methods)
        self._layer.load(keys, values, None)
        self.nbytes = sum(self._layer.memory().values())

    def attend(self, query: Tensor) -> Tensor:
        """Attention on the packed form."""
        return self._layer.attend(query, None, None, query.shape[-1] ** -0.5, None, None).transpose(1, 2)


@dataclass(frozen=True)
class Engine:
    """One way to hold keys and values, and the dtype it is given them in."""

    name: str
    dtype: torch.dtype
    make: Callable[[Tensor, Tensor], Layer]


def _kvpack(name: str, dtype: torch.dtype, quantize: Any) -> Engine:
    return Engine(name, dtype, lambda keys, values: KvpackLayer(keys, values, quantize))


ENGINES = {
    engine.name: engine
    for engine in (
        Engine(REFERENCE, torch.float32, TorchLayer),
        Engine("torch SDPA bfloat16", torch.bfloat16, TorchLayer),
        Engine("DynamicCache float32", torch.float32, DynamicLayer),
        Engine("DynamicCache bfloat16", torch.bfloat16, DynamicLayer),
        _kvpack("Exact float32", torch.float32, kvpack.Exact()),
        _kvpack("Exact bfloat16", torch.bfloat16, kvpack.Exact()),
        *(_kvpack(f"KIVI-{bits}", torch.float32, kvpack.KIVI(bits=bits)) for bits in (8, 4, 3, 2)),
    )
}


class RawLayers:
    """Raw keys and values in each dtype. Torch's engines share them; the packed ones are made from the first."""

    def __init__(self, heads: int, tokens: int, dim: int) -> None:
        size = (1, heads, tokens, dim)
        self._layers = {torch.float32: [(torch.randn(size), torch.randn(size))]}

    def get(self, dtype: torch.dtype, index: int) -> tuple[Tensor, Tensor]:
        """Return keys and values of a layer; all layers hold the same numbers, each in memory of its own."""
        if dtype not in self._layers:
            keys, values = self._layers[torch.float32][0]
            self._layers[dtype] = [(keys.to(dtype), values.to(dtype))]
        layers = self._layers[dtype]
        while len(layers) <= index:
            keys, values = layers[0]
            layers.append((keys.clone(), values.clone()))
        return layers[index]


class Sampler:
    """Times one engine, each call on the next of its layers."""

    def __init__(self, engine: Engine, raw: RawLayers, query: Tensor) -> None:
        first = engine.make(*raw.get(engine.dtype, 0))
        count = layer_count(first.nbytes)
        shares = isinstance(first, TorchLayer)
        self.layers = [first] + [engine.make(*raw.get(engine.dtype, i if shares else 0)) for i in range(1, count)]
        self.query = query.to(engine.dtype)
        self.output = first.attend(self.query)
        self._turn = 0
        self._calls = 1
        # Never more than there are layers: none may be read twice in a sample, when it is warm.
        self._calls = max(1, min(count, round(SAMPLE_NS / self())))

    def __call__(self) -> float:
        """Take a sample: nanoseconds a call."""
        start = time.perf_counter_ns()
        for _ in range(self._calls):
            self._turn = (self._turn + 1) % len(self.layers)
            self.layers[self._turn].attend(self.query)
        return (time.perf_counter_ns() - start) / self._calls


def layer_count(nbytes: int) -> int:
    """Return how many layers of `nbytes` take turns, so that their bytes come from memory."""
    least = 1 if nbytes >= LARGE_LAYER else 2
    return max(least, -(-WORKING_SET // nbytes))


class ReadProbe:
    """Reads a buffer far beyond the last cache level with the fastest of torch's reductions: the roofline.

    Only a read counts, as attention writes next to nothing. Which reduction runs at the speed of memory depends on
    torch's build and on the CPU, so several are tried once.
    """

    def __init__(self, floats: int) -> None:
        buffer = torch.ones(floats)
        integers = buffer.view(torch.int64)
        operations: dict[str, Callable[[], Tensor]] = {
            "sum of float32": buffer.sum,
            "sum of int64": integers.sum,
            "dot of float32": lambda: torch.dot(buffer, buffer),
            "max of float32": buffer.max,
        }
        self._bytes = buffer.nbytes
        best = {name: min(self._seconds(operation) for _ in range(3)) for name, operation in operations.items()}
        self.operation = min(best, key=best.__getitem__)
        self._read = operations[self.operation]

    def __call__(self) -> float:
        """Take a sample: GB (10^9 bytes) a second."""
        return self._bytes / self._seconds(self._read) / 1e9

    @staticmethod
    def _seconds(operation: Callable[[], Tensor]) -> float:
        start = time.perf_counter()
        operation()
        return time.perf_counter() - start


class LayerBench:
    """Cells of the attention parts, all with the same number of threads."""

    def __init__(self, threads: int, probe_floats: int = PROBE_FLOATS) -> None:
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        self.threads = threads
        self.probe = ReadProbe(probe_floats)

    def measure(self, shape: list[int], tokens: int, engines: list[str], seconds: float, new: int = 1) -> list[Row]:
        """Measure one cell.

        Args:
            shape: query heads, KV heads, head_dim.
            tokens: how many are held, the newest included.
            engines: names among `ENGINES`.
            seconds: how long to sample.
            new: queries, those of the newest tokens.

        Returns:
            A row for each engine: nanoseconds a call, bytes of a layer, relative error, and the bandwidth in GB/s
            that the probe reached between the samples.

        Raises:
            ArithmeticError: kvpack's lossless float32 does not agree with torch.
        """
        with torch.inference_mode():
            rows = self._measure(shape, tokens, engines, seconds, new)
        return_free_memory()  # a worker with another number of threads needs it for the same cell
        return rows

    def _measure(self, shape: list[int], tokens: int, engines: list[str], seconds: float, new: int) -> list[Row]:
        query_heads, heads, dim = shape
        raw = RawLayers(heads, tokens, dim)
        query = torch.randn(1, query_heads, new, dim)
        expected = TorchLayer(*raw.get(torch.float32, 0)).attend(query)
        samplers = {name: Sampler(ENGINES[name], raw, query) for name in engines}
        del raw
        samples = interleaved({**samplers, "probe": self.probe}, seconds)
        bandwidth = spread(samples["probe"])
        rows = []
        for name, sampler in samplers.items():
            error = float((sampler.output.float() - expected).norm() / expected.norm())
            if name == "Exact float32" and error > TOLERANCE:
                raise ArithmeticError(f"{name} at {shape}, {tokens} tokens: off by {error:.1e}, expected {TOLERANCE}")
            rows.append(
                {
                    "engine": name,
                    "shape": shape,
                    "tokens": tokens,
                    "new": new,
                    "threads": self.threads,
                    "ns": spread(samples[name]),
                    "layers": len(sampler.layers),
                    "layer_bytes": sampler.layers[0].nbytes,
                    "error": error,
                    "bandwidth": bandwidth | {"operation": self.probe.operation},
                }
            )
        return rows
