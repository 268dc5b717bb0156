"""llama.cpp through llama-cpp-python. Runs in a worker of the peers' environment, one for each cache setting."""

from __future__ import annotations

import ctypes
import os
import time
from typing import Any

import llama_cpp

TYPES = {"f16": llama_cpp.GGML_TYPE_F16, "q8_0": llama_cpp.GGML_TYPE_Q8_0, "q4_0": llama_cpp.GGML_TYPE_Q4_0}
FLASH = {False: llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED, True: llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED}
BATCH = 512


@llama_cpp.llama_log_callback
def _silence(*_: Any) -> None:
    """Its log would fill the pipe of errors."""


class LlamaCpp:
    """A model with one context that grows."""

    def __init__(self, threads: int, gguf: str, ids: list[int], cache_type: str, flash: bool) -> None:
        """Load the model and make its context; `ids` is the text that it will read."""
        llama_cpp.llama_log_set(_silence, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        settings = llama_cpp.llama_model_default_params()
        settings.n_gpu_layers = 0
        self._model = llama_cpp.llama_model_load_from_file(gguf.encode(), settings)
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load the model {gguf}")
        self._context = llama_cpp.llama_init_from_model(
            self._model, _context_settings(threads, len(ids), cache_type, flash)
        )
        if not self._context:
            raise RuntimeError(f"llama.cpp made no context with cache type {cache_type}, flash attention {flash}")
        self._ids = ids
        self._held = 0

    def start(self, tokens: int) -> None:
        """Read the text up to `tokens`, unless it is held already, and decode a few steps."""
        while self._held < tokens:
            self._decode(min(BATCH, tokens - self._held))
        self.steps(2)

    def steps(self, count: int) -> list[float]:
        """Decode `count` tokens of the text; return the milliseconds of each."""
        times = []
        for _ in range(count):
            start = time.perf_counter()
            self._decode(1)
            times.append(1e3 * (time.perf_counter() - start))
        return times

    def stop(self) -> None:
        """Nothing to free: the context goes on growing."""

    def version(self) -> str:
        """Return the versions of what is measured."""
        return f"llama-cpp-python {llama_cpp.__version__}"

    def _decode(self, count: int) -> None:
        tokens = (llama_cpp.llama_token * count)(*self._ids[self._held : self._held + count])
        status = llama_cpp.llama_decode(self._context, llama_cpp.llama_batch_get_one(tokens, count))
        if status != 0:
            raise RuntimeError(f"llama_decode returned {status} at {self._held} tokens")
        llama_cpp.llama_synchronize(self._context)
        self._held += count


def _context_settings(threads: int, positions: int, cache_type: str, flash: bool) -> Any:
    settings = llama_cpp.llama_context_default_params()
    settings.n_ctx = positions
    settings.n_batch = settings.n_ubatch = BATCH
    settings.n_threads = threads
    # Reading the text is not measured, and takes long with some of the settings.
    settings.n_threads_batch = os.cpu_count() or threads
    settings.type_k = settings.type_v = TYPES[cache_type]
    settings.flash_attn_type = FLASH[flash]
    return settings
