"""From records to a row a method."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from .contenders import FULL
from .intervals import Interval, of_mean, of_positive_mean, quantile, wilson
from .store import Record

Row = dict[str, Any]


def summarise(records: Sequence[Record]) -> list[Row]:
    """Return a row for each method, the full cache first: what was not measured is not in it.

    Quality on the text: `tokens`, `documents`, `perplexity`, `perplexity_change` (relative to the full cache), `kl`
    (mean, nats a token), `kl_p95`, `agreement` (share of tokens with the same likeliest next one), `lossy` (share of
    the past that was compressed on average). The change, KL and agreement have `_low` and `_high`: 95 % over
    documents, each paired with the full cache's; without them where there are too few documents.
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
        row |= _text(kinds["text"], full.get("text", []))
        row |= _greedy(kinds["greedy"])
        row |= _tasks(kinds["task"])
        row |= _costs(kinds["cost"])
        rows.append(row)
    return rows


def _text(own: list[Record], full: list[Record]) -> Row:
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
    # All documents are of one length: the mean over them is the mean over tokens.
    kls = [own["kl_sum"] / own["tokens"] for own, _ in pairs]
    agreements = [own["agree"] / own["tokens"] for own, _ in pairs]
    changes = [(own["nll"] - full["nll"]) / own["tokens"] for own, full in pairs]
    row |= _with_interval("kl", fmean(kls), of_positive_mean(kls))
    low_high = of_mean(agreements)
    row |= _with_interval("agreement", fmean(agreements), low_high and (max(low_high[0], 0.0), min(low_high[1], 1.0)))
    low_high = of_mean(changes)
    row |= _with_interval(
        "perplexity_change",
        math.expm1(fmean(changes)),
        low_high and (math.expm1(low_high[0]), math.expm1(low_high[1])),
    )
    return row


def _with_interval(name: str, value: float, interval: Interval | None) -> Row:
    if interval is None:
        return {name: value}
    return {name: value, f"{name}_low": interval[0], f"{name}_high": interval[1]}


def _greedy(own: list[Record]) -> Row:
    compared = [record for record in own if "equal" in record]
    if not compared:
        return {}
    return {
        "greedy": fmean(record["equal"] for record in compared),
        "greedy_of": fmean(record["of"] for record in compared),
    }


def _tasks(own: list[Record]) -> Row:
    scores: dict[str, list[float]] = defaultdict(list)
    for record in own:
        if "score" in record:
            scores[record["task"]].append(record["score"])
    row: Row = {}
    for task, found in scores.items():
        name = f"task_{task}"
        row[name] = fmean(found)
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
