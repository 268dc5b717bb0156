"""OpenVINO GenAI, its continuous batching with one request. Runs in a worker of the peers' environment."""

from __future__ import annotations

import time

import numpy
import openvino
import openvino_genai

CHUNK = 512
# More than any run decodes at one context: the request must not end by itself.
MOST_STEPS = 120


class OpenVino:
    """A pipeline that is stepped by hand, a token a step."""

    def __init__(self, threads: int, gguf: str, ids: list[int], cache_type: str) -> None:
        """Load the model; `ids` is the text that it will read."""
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.max_num_seqs = 1
        # GB, all at once: u4 crashes when the cache has to grow (openvino-genai 2026.4).
        scheduler.cache_size = 1
        scheduler.max_num_batched_tokens = CHUNK
        scheduler.enable_prefix_caching = False
        properties = {"INFERENCE_NUM_THREADS": threads, "KV_CACHE_PRECISION": cache_type}
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(gguf, scheduler, "CPU", properties)
        self._ids = ids
        self._request = 0
        self._handle: openvino_genai.GenerationHandle | None = None

    def start(self, tokens: int) -> None:
        """Read the first `tokens` of the text as a new request, and decode a few steps."""
        self._request += 1
        prompt = openvino.Tensor(numpy.array([self._ids[:tokens]], dtype=numpy.int64))
        settings = openvino_genai.GenerationConfig(max_new_tokens=MOST_STEPS, ignore_eos=True, do_sample=False)
        self._handle = self._pipeline.add_request(self._request, prompt, settings)
        # The prompt comes in chunks, a step each; the last of them gives the first token.
        for _ in range(-(-tokens // CHUNK)):
            self._pipeline.step()
        self.steps(2)

    def steps(self, count: int) -> list[float]:
        """Decode `count` tokens; return the milliseconds of each."""
        times = []
        for _ in range(count):
            start = time.perf_counter()
            self._pipeline.step()
            times.append(1e3 * (time.perf_counter() - start))
        if not self._pipeline.has_non_finished_requests():
            raise RuntimeError(f"the request ended before its {MOST_STEPS} tokens")
        return times

    def stop(self) -> None:
        """End the request and free its cache."""
        if self._handle is not None:
            self._handle.cancel()
            self._pipeline.step()
            self._handle = None

    def version(self) -> str:
        """Return the versions of what is measured."""
        return f"openvino-genai {openvino_genai.__version__}"
