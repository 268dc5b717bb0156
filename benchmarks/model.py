"""(c) The whole model: decode at several contexts, prefill with its peak memory, and the longest step."""

from __future__ import annotations

import heapq
from contextlib import ExitStack

from .measure import spread
from .options import Options
from .players import Player, play
from .progress import Bars
from .results import Row, Rows
from .worker import Worker

TARGET = "benchmarks.model_bench:ModelBench"
BASELINE = "DynamicCache"
HF = ("HF hqq-4", "HF quanto-4")
ENGINES = (BASELINE, "Exact", "KIVI-4", "KIVI-2", *HF)
# For the parts where only one kind of cache is compared with another.
FEW = (BASELINE, "Exact", "KIVI-4")
# A slow engine then takes fewer steps, and does not stretch the run.
TURN_SECONDS = 1.0
STALL_TURN = 20
LONGEST = 5


def run_decode(options: Options, bars: Bars) -> Rows:
    """Measure milliseconds a token with every engine, dtype, context and number of threads."""
    runs = [(dtype, threads) for dtype in options.dtypes for threads in options.threads]
    bar = bars.add("model", total=len(runs) * len(options.model_contexts) * options.rounds)
    rows = Rows()
    for dtype, threads in runs:
        with Worker(TARGET, threads, dtype=dtype, turn_seconds=TURN_SECONDS) as worker:
            players = [Player(engine, worker, {"engine": engine}) for engine in ENGINES]
            about = {"dtype": dtype, "threads": threads, "layers": worker.call("layers")}
            for context in options.model_contexts:
                bar.say(f"{dtype}, {context} tokens, threads: {threads}")
                rows += [about | row for row in play(players, context, options, bar.advance)]
    bar.end()
    return rows


def run_prefill(options: Options, bars: Bars) -> Rows:
    """Measure the prefill of a long prompt, every engine in a process of its own, by turns."""
    threads, tokens = max(options.threads), options.prefill_tokens
    bar = bars.add("prefill", total=options.prefill_rounds * len(FEW))
    with ExitStack() as stack:
        workers = {engine: stack.enter_context(Worker(TARGET, threads, dtype="float32")) for engine in FEW}
        answers: dict[str, list[Row]] = {engine: [] for engine in FEW}
        for _ in range(options.prefill_rounds):
            for engine, worker in workers.items():
                bar.say(f"{engine}, {tokens} tokens, threads: {threads}")
                answers[engine].append(worker.call("prefill", engine=engine, tokens=tokens))
                bar.advance()
    bar.end()
    return Rows(
        {
            "engine": engine,
            "dtype": "float32",
            "threads": threads,
            "tokens": tokens,
            "seconds": spread([answer["seconds"] for answer in of_engine]),
            # The first one alone: later ones find memory that the allocator has kept.
            "peak_bytes": of_engine[0]["peak_bytes"],
        }
        for engine, of_engine in answers.items()
    )


def run_stalls(options: Options, bars: Bars) -> Rows:
    """Look for the longest among many decode steps: packing must not stop the stream of tokens."""
    threads, turns = max(options.threads), -(-options.stall_steps // STALL_TURN)
    bar = bars.add("stalls", total=turns)
    times: dict[str, list[float]] = {engine: [] for engine in FEW}
    with Worker(TARGET, threads, dtype="float32") as worker:
        players = [Player(engine, worker, {"engine": engine}) for engine in FEW]
        for player in players:
            bar.say(f"{player.name}, prefill of {options.stall_context} tokens")
            player.start(options.stall_context)
        bar.say(f"{options.stall_steps} steps of each engine, threads: {threads}")
        for _ in range(turns):
            for player in players:
                times[player.name] += player.steps(STALL_TURN)
            bar.advance()
    bar.end()
    return Rows(_stall_row(engine, steps, options) | {"threads": threads} for engine, steps in times.items())


def _stall_row(engine: str, steps: list[float], options: Options) -> Row:
    longest = heapq.nlargest(LONGEST, range(len(steps)), key=steps.__getitem__)
    return {
        "engine": engine,
        "dtype": "float32",
        "context": options.stall_context,
        "ms": spread(steps),
        "longest": [{"step": step, "ms": steps[step]} for step in longest],
    }
