"""The page about all models: docs/conformance.md."""

from __future__ import annotations

import platform
from collections import Counter

import torch
import transformers
from kvpack import _kvpack

from .compare import EIGHT_BIT_TOLERANCE, HALF_FLOOR, HALF_RATIO, TOLERANCE
from .examine import Row
from .modes import MODES

ABOUT = f"""Each model is made tiny from its default configuration, with random weights whose deviation is 0.15, and run
with transformers' own cache and with kvpack's: loaded by `attn_implementation="kvpack"` with a `PackedCache`, and
attached. Modes: {", ".join(MODES)}, an image where a family has one, bfloat16, 8 bits (KIVI) and eviction (SnapKV).

- *Right*: logits differ by at most {TOLERANCE:g} of their deviation, and tokens not at all; in bfloat16 the distance
  from float32 is at most {HALF_RATIO:g} times transformers' own plus {HALF_FLOOR:g}; with 8 bits the root mean
  square is at most {EIGHT_BIT_TOLERANCE:g}. What exceeds that is right only where transformers' own logits move as much
  when its keys and values do, by 1e-6 or by the error of 8 bits, or where there is no right to be had: it says another
  thing of a prompt in parts than of the whole, or guesses change its tokens and not kvpack's. The notes say so.
- *Refused*: one of kvpack's errors, when the cache is made or attached. *Transformers raises*: with its own cache too.
- *Packed*: layers that kvpack holds, of all. *Bytes*: of a cache without loss, against transformers' after the same 51
  tokens. *8 bits*: the root mean square, in deviations. *Shows*: by how much another token in the prompt moves the last
  logits, in deviations. *Itself*: modes in which transformers itself raises."""
VERDICTS = ("right", "refused", "wrong", "transformers raises", "not built")


def versions() -> dict[str, str]:
    """What was run."""
    return {
        "transformers": transformers.__version__,
        "torch": torch.__version__.partition("+")[0],
        "kvpack": _kvpack.__version__,
        "Python": platform.python_version(),
    }


def totals(rows: list[Row]) -> str:
    """How many rows have which verdict, and of how many model types."""
    count = Counter(row["verdict"] for row in rows)
    built = {row["model"] for row in rows if row["verdict"] != "not built"}
    told = ", ".join(f"{count[verdict]} {verdict}" for verdict in VERDICTS)
    return f"{told}; {len(built)} of {len({row['model'] for row in rows})} model types built"


def told(row: Row) -> str:
    """A row in words, as far as it is not just right."""
    lines = [f"{row['model']} ({row['class']}): {row['verdict']} {row.get('why', '')}"]
    for way, result in row.get("ways", {}).items():
        lines += [f"    {way}: {mode}: {why}" for mode, why in result.get("wrong", {}).items()]
        if "why" in result:
            lines.append(f"    {way}: refused: {result['why']}")
    return "\n".join(lines)


def page(rows: list[Row]) -> str:
    """The whole page."""
    rows = sorted(rows, key=lambda row: (row["model"], row["kind"]))
    what = ", ".join(f"{name} {version}" for name, version in versions().items())
    lines = [
        "# Every architecture of transformers",
        "",
        f"By `make conformance`, with {what}.",
        "",
        f"**{totals(rows)}.**",
        "",
        *ABOUT.splitlines(),
        "",
        "| model | kind | verdict | packed | layers | path | bytes | 8 bits | shows | itself | notes |",
        "|---|---|---|---:|---|---|---:|---:|---:|---|---|",
    ]
    return "\n".join([*lines, *(_line(row) for row in rows), ""])


def _line(row: Row) -> str:
    way = row.get("ways", {}).get("loaded", {})
    eight = str(way.get("notes", {}).get("8 bits", ""))
    layers = str(row.get("layers", ""))
    count = sum(int(part.split()[0]) for part in layers.split(", ") if part)
    whole = row.get("transformers_bytes") or 0
    cells = [
        row["model"],
        row["kind"],
        row["verdict"],
        f"{row['packed']}/{count}" if "packed" in row else "",
        layers,
        row.get("path", ""),
        f"x{row['bytes'] / whole:.2f}" if whole else "",
        "refused" if eight.startswith("refused") else eight.partition(";")[0],
        f"{row['sees']:.1g}" if "sees" in row else "",
        ", ".join(row.get("itself", {})),
        _notes(row),
    ]
    return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _notes(row: Row) -> str:
    """What else is to be said, shortly; of both ways once."""
    notes = [row["why"]] if "why" in row else []
    ways = row.get("ways", {})
    for way, result in ways.items():
        if result["verdict"] == "refused":
            notes.append(f"{way} refused: {result['why']}")
        notes += [f"{way}, {mode}: {why}" for mode, why in result.get("wrong", {}).items()]
        for mode, why in result.get("notes", {}).items():
            usual = mode == "bfloat16" or (mode == "8 bits" and ";" not in str(why) and "refused" not in str(why))
            if not usual and f"{mode}: {why}" not in notes:
                notes.append(f"{mode}: {why}")
    if row.get("nothing packed"):
        notes.append("warns that nothing is packed")
    return "; ".join(notes)[:400]
