"""From records to a row a method."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from .bootstrap import interval, quantile, wilson
from .contenders import FULL
from .store import Record

Row = dict[str, Any]


def summarise(records: Sequence[Record], seed: int = 0) -> list[Row]:
    """Return a row for each method, the full cache first: what was not measured is not in it.

    Quality on the text: `tokens`, `documents`, `perplexity`, `perplexity_change` (relative to the full cache), `kl`
    (mean, nats a token), `kl_p95`, `agreement` (share of tokens with the same likeliest next one), `lossy` (share of
    the past that was compressed on average). The change, KL and agreement have `_low` and `_high`: 95 %, paired
    bootstrap over documents.
    Continuations: `greedy` (mean tokens before the first difference), `greedy_of`.
    Tasks: `task_<name>` (mean score) with `_low` and `_high` (95 %, Wilson), `task_samples`, `task_failed` (samples
    that the cache could not read: they are in no mean).
    Cost: `bytes_per_token`, `of_fp16`, `ms` (median) with `ms_p10` and `ms_p90`, `speedup` (over the full
    cache in the same run), `prefill_ms`, `pack_ms`, `peak_bytes`.
    """
    by_method: dict[str, dict[str, list[Record]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        by_method[record["method"]][record["kind"]].append(record)
    full = by_method.get(FULL, {})
    labels = sorted(by_method, key=lambda label: label != FULL)
    rows = []
    for label in labels:
        kinds = by_method[label]
        row: Row = {"method": label}
        row |= _text(kinds["text"], full.get("text", []), seed)
        row |= _greedy(kinds["greedy"])
        row |= _tasks(kinds["task"])
        row |= _costs(kinds["cost"])
        rows.append(row)
    return rows


def _text(own: list[Record], full: list[Record], seed: int) -> Row:
    baseline = {record["document"]: record for record in full}
    pairs = [(record, baseline[record["document"]]) for record in own if record["document"] in baseline]
    if not pairs:
        return {}
    tokens = sum(record["tokens"] for record, _ in pairs)
    row: Row = {
        "tokens": tokens,
        "documents": len(pairs),
        "perplexity": math.exp(sum(record["nll"] for record, _ in pairs) / tokens),
        "lossy": sum(record["lossy"] * record["tokens"] for record, _ in pairs) / tokens,
    }
    if "kl" not in pairs[0][0]:
        return row
    kl = sorted(x for record, _ in pairs for x in record["kl"])
    row["kl_p95"] = quantile(kl, 0.95)
    for name, statistic in (("kl", _kl), ("agreement", _agreement), ("perplexity_change", _perplexity_change)):
        row[name] = statistic(pairs)
        row[f"{name}_low"], row[f"{name}_high"] = interval(pairs, statistic, seed)
    return row


Pairs = Sequence[tuple[Record, Record]]


def _kl(pairs: Pairs) -> float:
    return _per_token(pairs, sum(own["kl_sum"] for own, _ in pairs))


def _agreement(pairs: Pairs) -> float:
    return _per_token(pairs, sum(own["agree"] for own, _ in pairs))


def _perplexity_change(pairs: Pairs) -> float:
    return math.expm1(_per_token(pairs, sum(own["nll"] - full["nll"] for own, full in pairs)))


def _per_token(pairs: Pairs, total: float) -> float:
    return float(total / sum(own["tokens"] for own, _ in pairs))


def _greedy(own: list[Record]) -> Row:
    compared = [record for record in own if "equal" in record]
    if not compared:
        return {}
    return {
        "greedy": statistics.fmean(record["equal"] for record in compared),
        "greedy_of": statistics.fmean(record["of"] for record in compared),
    }


def _tasks(own: list[Record]) -> Row:
    scores: dict[str, list[float]] = defaultdict(list)
    for record in own:
        if "score" in record:
            scores[record["task"]].append(record["score"])
    row: Row = {}
    for task, found in scores.items():
        name = f"task_{task}"
        row[name] = statistics.fmean(found)
        row[f"{name}_low"], row[f"{name}_high"] = wilson(row[name], len(found))
    if scores:
        row["task_samples"] = sum(map(len, scores.values()))
        row["task_failed"] = len(own) - row["task_samples"]
    return row


def _costs(own: list[Record]) -> Row:
    if not own:
        return {}
    record = own[-1]
    ms = sorted(record["ms"])
    row = {name: record[name] for name in ("bytes_per_token", "prefill_ms", "pack_ms", "peak_bytes", "threads")}
    return row | {
        "of_fp16": record["bytes"] / record["fp16_bytes"],
        "ms": record["median_ms"],
        "ms_p10": quantile(ms, 0.1),
        "ms_p90": quantile(ms, 0.9),
        "speedup": record["full_ms"] / record["median_ms"],
        "cost_context": record["context"],
    }
