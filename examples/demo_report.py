"""What the demo leaves behind: a table on the screen, the same table as Markdown, and all numbers as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

from demo_environment import environment_line
from demo_measure import FULL, Forced, Result, Spread
from rich.console import Console
from rich.markup import escape
from rich.table import Table

# The share of the machine that other programs may use before the timing is called disturbed.
BUSY = 0.05
COLUMNS = (
    "cache",
    "bytes held",
    "x smaller\nthan fp16",
    "x smaller than\nDynamicCache",
    "ms per token\n(p10-p90)",
    "x faster than\nDynamicCache",
    "s to first token\n(least-most)",
    "KL, nats",
)


@dataclass
class Report:
    """The results of one run, and the ways to show them."""

    model: str
    question: str
    surroundings: dict[str, Any]
    config: Any
    forced: Forced

    @property
    def results(self) -> list[Result]:
        """The results, in the order of the table."""
        return list(self.forced.results.values())

    @property
    def fp16_bytes(self) -> int:
        """Bytes that the tokens held would take as plain float16 keys and values."""
        config = self.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return 2 * 2 * config.num_hidden_layers * heads * head_dim * self.forced.tokens_held

    @property
    def disturbed(self) -> str:
        """Say what disturbed the timing; empty if nothing did.

        Caches do not suffer alike from other programs: torch's attention waits for all of its threads after
        each parallel region, and where one of them has lost its CPU the wait can exceed the work many times.
        """
        others = self.surroundings["other_programs"]
        if others is None or others <= BUSY:
            return ""
        return f"other programs used {others:.0%} of the CPUs meanwhile; run again on an idle machine"

    def speedup(self, result: Result) -> Spread:
        """Return how many times faster than DynamicCache a step was: ratios within a step, not of medians."""
        full = self.forced.results[FULL].step_ms
        return Spread.of([theirs / ours for theirs, ours in zip(full, result.step_ms, strict=True)])

    def rows(self) -> list[tuple[str, ...]]:
        """Return the table's cells, one row a cache."""
        full = self.forced.results[FULL]
        rows = []
        for result in self.results:
            ms, first = Spread.of(result.step_ms), result.first_token_s
            rows.append(
                (
                    result.name,
                    megabytes(result.bytes_held),
                    f"{self.fp16_bytes / result.bytes_held:.2f}",
                    f"{full.bytes_held / result.bytes_held:.2f}",
                    f"{ms.median:.1f} ({ms.p10:.1f}-{ms.p90:.1f})",
                    "1" if result is full else f"{self.speedup(result).median:.2f}",
                    f"{median(first):.1f} ({min(first):.1f}-{max(first):.1f})",
                    "0" if result is full else f"{fmean(result.kl):.1e}",
                )
            )
        return rows

    def notes(self) -> list[str]:
        """Return what a reader must know to trust the table."""
        forced, empty = self.forced, Spread.of(self.forced.empty_ms)
        notes = [
            f"{self.model}, float32, prompt of {forced.prompt_tokens} tokens. Bytes: at {forced.tokens_held} "
            f"tokens; as float16 they would take {megabytes(self.fp16_bytes)}.",
            f"Time and KL: {forced.steps} teacher-forced steps, every cache in turn at every step. Time: the "
            "median; times faster: the median of the ratios within a step; KL to DynamicCache: the mean.",
            f"A step with an empty DynamicCache takes {empty.median:.1f} ms "
            f"({empty.p10:.1f}-{empty.p90:.1f}): about the model's own share of every time.",
            f"First token: `generate` from the bare prompt, packing included, the median of "
            f"{len(self.forced.results[FULL].first_token_s)}, every cache in turn.",
            environment_line(self.surroundings),
        ]
        if self.disturbed:
            notes.append(f"NOT A FAIR TIMING: {self.disturbed}.")
        for result in self.results:
            if result.calls.get("materialised"):
                count = result.calls["materialised"]
                notes.append(f"{result.name}: {count} attention calls ran on a decompressed copy, not the packed form.")
        return notes

    def print(self, console: Console, tokenizer: Any) -> None:
        """Print the table, the notes and the answers."""
        # The table needs its width where nobody's terminal sets one, as in a log file.
        if not console.is_terminal:
            console.width = max(console.width, 140)
        table = Table(header_style="bold", row_styles=["", "dim"])
        for i, column in enumerate(COLUMNS):
            table.add_column(column, justify="right" if i else "left", no_wrap=True)
        for row in self.rows():
            table.add_row(*row)
        console.print()
        console.print(table)
        for note in self.notes():
            style = "bold red" if note.startswith("NOT") else "dim"
            console.print(f"  {note}", highlight=False, style=style, markup=False)
        console.print(f"\n[bold]{escape(self.question)}[/]", highlight=False)
        for result in self.results:
            answer = tokenizer.decode(result.generated, skip_special_tokens=True).strip()
            console.print(f"\n[bold]{result.name}[/]\n  {escape(answer)}", highlight=False)
        console.print()

    def write_markdown(self, path: Path) -> None:
        """Write the table and the notes as Markdown."""
        header = "| " + " | ".join(column.replace("\n", " ") for column in COLUMNS) + " |"
        rule = "|" + "|".join(["---"] + ["---:"] * (len(COLUMNS) - 1)) + "|"
        rows = ["| " + " | ".join(row) + " |" for row in self.rows()]
        notes = [f"- {note}" for note in self.notes()]
        path.write_text("\n".join([header, rule, *rows, "", *notes]) + "\n", encoding="utf-8")

    def write_json(self, path: Path, tokenizer: Any) -> None:
        """Write every number, the series of single steps and the environment."""
        caches = [
            asdict(result)
            | {
                "times_smaller_than_fp16": self.fp16_bytes / result.bytes_held,
                "times_smaller_than_dynamic": self.forced.results[FULL].bytes_held / result.bytes_held,
                "ms_per_token": asdict(Spread.of(result.step_ms)),
                "times_faster_than_dynamic": asdict(self.speedup(result)),
                "first_token_s_median": median(result.first_token_s),
                "kl_mean_nats": fmean(result.kl),
                "answer": tokenizer.decode(result.generated, skip_special_tokens=True),
            }
            for result in self.results
        ]
        content = {
            "environment": self.surroundings,
            "model": self.model,
            "question": self.question,
            "prompt_tokens": self.forced.prompt_tokens,
            "teacher_forced_steps": self.forced.steps,
            "fp16_bytes": self.fp16_bytes,
            "empty_cache_ms": self.forced.empty_ms,
            "caches": caches,
        }
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def megabytes(count: int) -> str:
    """Return a number of bytes in MB (10^6 bytes)."""
    return f"{count / 1e6:.1f} MB"
