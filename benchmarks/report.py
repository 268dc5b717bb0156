"""The report: README.md and two pictures, from the results alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import picture, tables
from .results import Part, Results, Rows
from .targets import targets

# The share of the CPUs' time that other programs may take. On few cores even a little is much: threads that wait for
# each other wait for the slowest.
DISTURBING = 0.03

HEAD = """\
# Benchmarks

kvpack's packed KV caches beside torch, transformers' own caches and other runtimes, on one machine. This page is
written by the benchmarks, from `results/latest.json`; edit the modules, not the page.

    make bench                            # everything but the peers: about 30 minutes on two cores
    make bench ARGS="--only attention"    # some parts, with commas between; the others keep their results
    make bench ARGS="--quick"             # minutes: does everything work? Its report goes to results/quick
    make bench-peers                      # llama.cpp and OpenVINO: installs them into .venv-peers, then 25 minutes

Within a part all engines take turns, so that what disturbs the machine meets them alike; compare figures within a
part. Figures are medians, with the 10th and 90th percentile in brackets. Head shapes are written as query heads / KV
heads / head_dim: 9/3/64 is SmolLM2-135M, 32/8/128 Llama 3 8B, 16/16/128 a model without grouped queries, 4/1/256
Gemma 3 1B. KIVI-4 is `kvpack.KIVI(bits=4)`, and so on; Exact is lossless. *k* is 1024 tokens.
"""

GOALS = """\
## Goals

What kvpack set out to reach, and whether it does here. A cell is a head shape, context, number of threads or engine;
*met within noise*: less than 2 % short of a goal that says "not slower". How far the arithmetic may be off is a matter
of the tests.
"""

GOALS_NOTE = """\
*: other engines as they stood on another machine when the goal was set, as ratio to torch SDPA float32 there. What
context costs: see Peers.
"""


@dataclass(frozen=True)
class Section:
    """What the report says of one part."""

    title: str
    text: str
    content: Callable[[Rows], list[str]]
    picture: str | None = None


SECTIONS = {
    "attention": Section(
        "Decode attention of one layer",
        """\
Nanoseconds a cached token for one step of one layer (a new token, batch of 1), and how many times faster than torch
SDPA float32. *DynamicCache* is torch SDPA and the copy of the whole cache by which DynamicCache appends a token. Every
engine has several layers, 128 MB or more in all, which take turns: the bytes come from memory, as in a model.
""",
        lambda rows: [
            *tables.decode(rows),
            "The bandwidth that the packed bytes are read at, as share of what a plain read of a large buffer reached "
            "between the samples (the dotted lines of the picture):",
            *tables.roofline(rows),
            "Few cached tokens, microseconds a call: more threads must not be slower than one.",
            *tables.small(rows),
        ],
        "attention.png",
    ),
    "queries": Section(
        "Many new tokens over a packed past",
        """\
As in the next turn of a chat: 64 new tokens attend to a past of 8k and to each other. Microseconds a new token for one
layer, and how many times faster than torch SDPA float32 over the raw past.
""",
        tables.queries,
    ),
    "model": Section(
        "The whole model",
        """\
SmolLM2-135M-Instruct, milliseconds a decoded token by tokens cached, and how many times faster than DynamicCache. All
caches are filled with the same keys and values. *Context costs*: nanoseconds a cached token and layer, from what a step
takes longer at the longest context than at the shortest. *HF*: transformers' QuantizedCache, 4 bits, with the same
group and residual length as KIVI.
""",
        tables.model,
        "model.png",
    ),
    "prefill": Section(
        "Prefill",
        """\
The prompt at once, into a new cache. Every cache has a process of its own. Memory: the process's peak above what it
held before.
""",
        tables.prefill,
    ),
    "stalls": Section("Stalls", "Many decode steps in a row, and the longest of them.\n", tables.stalls),
    "peers": Section(
        "Peers",
        """\
The same model from the same GGUF file in other runtimes, by turns with transformers: milliseconds a decoded token by
tokens cached. The peers compute with the GGUF's 4-bit weights and transformers with float32 or bfloat16 ones, so a step
with a short context costs them much less; what context costs (nanoseconds a cached token and layer, from what a step
takes longer at the longest context than at the shortest) is what the caches decide.
""",
        tables.peers,
    ),
    "kernels": Section(
        "The Rust kernels alone",
        """\
Criterion's medians with their 95 % confidence intervals: nanoseconds a cached token, columns by tokens cached.
""",
        lambda rows: tables.folded("all of them", tables.kernels(rows)),
    ),
}


def write(results: Results, folder: Path) -> list[Path]:
    """Write README.md and the pictures of the parts that were measured into `folder`; return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    written = picture.draw(results, folder)
    readme = folder / "README.md"
    readme.write_text(text(results), encoding="utf-8")
    return [readme, *written]


def text(results: Results) -> str:
    """Return the report in Markdown."""
    goals = targets(results)
    lines = [HEAD, GOALS, *tables.goals(goals), GOALS_NOTE]
    lines += tables.folded(f"Every cell ({sum(len(goal.cells) for goal in goals)})", tables.goal_cells(goals))
    for name, section in SECTIONS.items():
        lines += [f"## {section.title}", ""]
        part = results.parts.get(name)
        lines += _section(section, part) if part else [section.text, "Not measured yet.", ""]
    return _single_blank_lines("\n".join(lines))


def environment_line(surroundings: dict[str, Any]) -> str:
    """Return an environment in one line."""
    packed = surroundings["kvpack"]
    compared = "".join(f"{name} {found}, " for name, found in surroundings["compared"].items())
    notes = " QUICK RUN: the numbers say nothing." if surroundings["quick"] else ""
    others = surroundings.get("others")
    if others is not None:
        notes += f" Other programs took {100 * others:.1f} % of the CPUs' time."
        notes += " DISTURBED." if others > DISTURBING else ""
    return (
        f"{surroundings['cpu']} ({surroundings['cpus']} CPUs; {' '.join(surroundings['cpu_flags'])}), kvpack "
        f"{packed['version']} ({packed['isa']}, commit {surroundings['commit'] or 'unknown'}), torch "
        f"{surroundings['torch']}, transformers {surroundings['transformers']}, {compared}Python "
        f"{surroundings['python']}, {surroundings['date'][:10]}.{notes}"
    )


def _section(section: Section, part: Part) -> list[str]:
    drawn = ["", f"![{section.title}]({section.picture})", ""] if section.picture else []
    versions = " Versions: " + "; ".join(part.rows.distinct("version")) + "." if part.rows.distinct("version") else ""
    return [section.text, *drawn, *section.content(part.rows), f"*{environment_line(part.environment)}*{versions}", ""]


def _single_blank_lines(text: str) -> str:
    lines = text.split("\n")
    kept = [line for before, line in zip(["", *lines], lines, strict=False) if line or before]
    return "\n".join(kept).strip("\n") + "\n"
