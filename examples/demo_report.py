"""What the demo leaves behind: a table on the screen, the same table as Markdown, and all numbers as JSON."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

import kvpack
import torch
from demo_measure import FULL, Forced, Result, Spread
from rich.console import Console
from rich.markup import escape
from rich.table import Table

# The instruction sets that decide how fast a KV cache can be read.
CPU_FLAGS = (
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512bw",
    "avx512_vnni",
    "avx_vnni",
    "amx_int8",
    "asimd",
    "asimddp",
)
# A load average above this, before the run, means that other programs took part in the timing.
BUSY = 0.5
COLUMNS = (
    "cache",
    "bytes held",
    "x smaller\nthan fp16",
    "x smaller than\nDynamicCache",
    "ms per token\n(p10-p90)",
    "x faster than\nDynamicCache",
    "tokens equal to\nDynamicCache",
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

    def speedup(self, result: Result) -> Spread:
        """Return how many times faster than DynamicCache a step was: ratios within a step, not of medians."""
        full = self.forced.results[FULL].step_ms
        return Spread.of([theirs / ours for theirs, ours in zip(full, result.step_ms, strict=True)])

    def rows(self) -> list[tuple[str, ...]]:
        """Return the table's cells, one row a cache."""
        full = self.forced.results[FULL]
        rows = []
        for result in self.results:
            ms = Spread.of(result.step_ms)
            rows.append(
                (
                    result.name,
                    megabytes(result.bytes_held),
                    f"{self.fp16_bytes / result.bytes_held:.2f}",
                    f"{full.bytes_held / result.bytes_held:.2f}",
                    f"{ms.median:.1f} ({ms.p10:.1f}-{ms.p90:.1f})",
                    "1" if result is full else f"{self.speedup(result).median:.2f}",
                    f"{result.equal_tokens} of {len(full.generated)}",
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
            f"A step with an empty cache takes {empty.median:.1f} ms ({empty.p10:.1f}-{empty.p90:.1f}): "
            "the time of the model itself, which no cache can save.",
            "Tokens equal: greedy `generate` from the bare prompt, up to the first difference.",
            environment_line(self.surroundings),
        ]
        if self.surroundings["load_average"] > BUSY:
            notes.append(
                f"The machine was busy before the run (load average {self.surroundings['load_average']}): "
                "take its times with care."
            )
        for result in self.results:
            if result.calls.get("materialised"):
                count = result.calls["materialised"]
                notes.append(
                    f"{result.name}: {count} attention calls ran on a decompressed copy, not the packed form."
                )
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
            console.print(f"  {note}", highlight=False, style="dim", markup=False)
        console.print(f"\n[bold]{escape(self.question)}[/]", highlight=False)
        for result in self.results:
            answer = tokenizer.decode(result.generated, skip_special_tokens=True).strip()
            seconds = f"first token after {result.first_token_s:.1f} s"
            console.print(f"\n[bold]{result.name}[/] ({seconds})\n  {escape(answer)}", highlight=False)
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


def environment(root: Path) -> dict[str, Any]:
    """Return what the numbers depend on: CPU, threads, versions, commit, and how busy the machine was."""
    name, flags = cpu()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": name,
        "cpu_flags": flags,
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": version("torch"),
        "transformers": version("transformers"),
        "kvpack": kvpack.info(),
        "commit": commit(root),
    }


def environment_line(surroundings: dict[str, Any]) -> str:
    """Return the environment in one line."""
    packed = surroundings["kvpack"]
    return (
        f"{surroundings['cpu']} ({surroundings['cpus']} CPUs; {' '.join(surroundings['cpu_flags'])}), "
        f"{surroundings['threads']} threads, kvpack {packed['version']} ({packed['isa']}, commit "
        f"{surroundings['commit'] or 'unknown'}), torch {surroundings['torch']}, transformers "
        f"{surroundings['transformers']}, Python {surroundings['python']}."
    )


def cpu() -> tuple[str, list[str]]:
    """Return the CPU's name and the flags among `CPU_FLAGS` that it has."""
    fields: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip().lower(), value.strip())
    except OSError:
        pass  # no Linux: the name alone must do
    present = set((fields.get("flags") or fields.get("features") or "").split())
    name = fields.get("model name") or platform.processor() or platform.machine()
    return name, [flag for flag in CPU_FLAGS if flag in present]


def commit(root: Path) -> str | None:
    """Return the checkout's commit, with "-dirty" if files differ from it; None outside a git checkout."""
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=10", "--exclude=*"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip() or None
