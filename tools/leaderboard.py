"""Every registered method at its standard settings, and transformers' own caches beside them, on the test model.

    make leaderboard TEXT=wikitext2-test.txt                        (or: python tools/leaderboard.py --help)
    make leaderboard TEXT=wikitext2-test.txt ARGS="--family evict"

It writes benchmarks/leaderboard.md, or evictions.md, its pictures, and its table in the README. Cells that were
measured before are kept in benchmarks/results: a new method costs its own time only; `--fresh` measures everything
again, `--report` nothing: it makes both pages anew from the numbers, in seconds.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kvpack
import torch
from kvpack.evaluation import Evaluation
from kvpack.evaluation.contenders import FULL, Hqq, Quanto
from kvpack.evaluation.tasks import TASKS
from kvpack.methods.registry import EVICT, QUANTIZE
from kvpack.methods.spec import parse_spec
from test_model import FetchError, document, test_model_path
from transformers import AutoModelForCausalLM, AutoTokenizer

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
README = FOLDER.parent / "README.md"


@dataclass(frozen=True)
class Board:
    """A page of the leaderboard.

    Attributes:
        name: of its files.
        head: how the page begins.
        context: tokens of a document of the text.
        tokens: of the text that are read.
        table: what the README shows of it.
        settings: of the evaluation, where they are not its defaults.
    """

    name: str
    head: str
    context: int
    tokens: int
    settings: Callable[[int], dict[str, Any]]
    table: Callable[[Evaluation], str]


BOARDS = {
    "quantize": Board(
        "leaderboard",
        """# Leaderboard

Every codec at its standard settings, and some together with an eviction, beside the full cache, a cache that only keeps
a window, and transformers' own quantised caches. `make leaderboard TEXT=...` measures what is new and writes this page;
the numbers of every cell are in `results/leaderboard`.

""",
        4096,
        32_768,
        lambda context: {
            "tasks": tuple(TASKS),
            "task_contexts": (context // 4, context * 3 // 4),
            "depths": (0.1, 0.5, 0.9),
        },
        lambda result: bits_table(result),
    ),
    "evict": Board(
        "evictions",
        """# Evictions

Every scorer that chooses a prompt's tokens, alone and under AdaKV, beside the full cache. The question of a task is the
end of the prompt, where SnapKV and its like look. `make leaderboard TEXT=... ARGS="--family evict"` measures what is
new and writes this page; the numbers of every cell are in `results/evictions`.

""",
        2048,
        16_384,
        lambda context: {
            "tasks": ("passkey", "multikey"),
            "task_contexts": (context * 3 // 2,),
            "depths": (0.1, 0.5, 0.9),
            "ask": "with",
            "chunk": 256,
            "greedy": 0,
            "costs": False,
        },
        lambda result: evictions_table(result),
    ),
}


CODECS = {
    "exact": ('`"lossless"`: `Exact()`', "32"),
    "kvarn:bits=8": ('`"near-lossless"`: `KVarN(bits=8)`', "8.56"),
    "graded:key_bits=4.5:value_bits=4": ('`"balanced"`: `Graded(key_bits=4.5, value_bits=4)`', "4.5"),
    "graded:key_bits=3.5:value_bits=4": ('`"small"`: `Graded(key_bits=3.5, value_bits=4)`', "4.0"),
    "graded:key_bits=3:value_bits=3": ("`Graded(key_bits=3, value_bits=3)`", "3.25"),
    "graded:key_bits=2.5:value_bits=2": ('`"tiny"`: `Graded(key_bits=2.5, value_bits=2)`', "2.5"),
    "graded:key_bits=2:value_bits=2": ("`Graded(key_bits=2, value_bits=2)`", "2.25"),
    "kivi:bits=8:group=64:compensation=gptq": ("`KIVI(bits=8, group=64, compensation=GPTQ())`", "8.5"),
    "kivi:bits=8:group=64": ("`KIVI(bits=8, group=64)`", "8.5"),
    "graded:key_bits=8:value_bits=8": ("`Graded(key_bits=8, value_bits=8)`", "8.25"),
    "q8": ("`Q8()`", "8.5"),
    "kivi:bits=8": ("`KIVI(bits=8)`", "9.0"),
    "kivi:bits=4": ("`KIVI(bits=4)`", "5.0"),
    "kivi:bits=3": ("`KIVI(bits=3)`", "4.0"),
    "kivi:bits=2": ("`KIVI(bits=2)`", "3.0"),
    "kvarn:bits=4": ("`KVarN(bits=4)`", "4.56"),
    "kvarn:bits=3": ("`KVarN(bits=3)`", "3.56"),
    "kvarn:bits=2": ("`KVarN(bits=2)`", "2.56"),
    "q4": ("`Q4()`", "4.5"),
    "rotated:bits=4": ("`Rotated(bits=4)`", "4.25"),
    "rotated:bits=4:center=True": ("the same with `center=True`", "4.25"),
    "rotated:bits=4:compensation=gptq": ("`Rotated(bits=4)` with `compensation=GPTQ()`", "4.25"),
    "rotated:bits=3": ("`Rotated(bits=3)`", "3.25"),
    "hqq:bits=4": ("transformers' QuantizedCache, hqq, 4 bit codes", ""),
    "hqq:bits=2": ("the same, 2 bit codes", ""),
    "quanto:bits=4": ("transformers' QuantizedCache, quanto, 4 bit codes", ""),
}
"""What the README's table of codecs shows: the method, its name there, and its bits a number with metadata."""


def methods(family: str, context: int) -> list[str]:
    """Return what is compared: the registry's methods, and the references that are installed."""
    if family == "evict":
        own = [setting for method in EVICT.values() for setting in method.standard]
        shared = [f"adakv({name}:budget=0.25)" for name in ("h2o", "a2sf", "l2norm")]
        scores = ("snapkv", "expected", "keydiff")
        shared += [f"adakv({name}:budget={budget})" for name in scores for budget in (0.5, 0.25, 0.1)]
        return [*own, *shared]
    installed = [
        f"{backend.backend}:bits={bits}" for backend in (Hqq, Quanto) if backend.installed() for bits in (4, 2)
    ]
    own = [setting for method in QUANTIZE.values() for setting in method.standard]
    return [*own, *TOGETHER, *installed, f"window:tokens={context // 4}"]


TOGETHER = (
    "snapkv:budget=0.25+kivi:bits=4",
    "keydiff:budget=0.5+graded:key_bits=3.5:value_bits=4",
    "h2o:budget=0.5+rotated:bits=4",
)


def main() -> int:
    """Measure and write."""
    parser = argparse.ArgumentParser(description="Compare all methods on the test model.")
    parser.add_argument("--family", choices=BOARDS, default="quantize", help="of the methods (default: quantize)")
    parser.add_argument("--text", type=Path, help="a text in UTF-8 (default: a speech of 1941, of 4000 tokens)")
    parser.add_argument(
        "--tokens", type=int, help="tokens to read (default: 32768, of evictions 16384, or what the speech has)"
    )
    parser.add_argument(
        "--context", type=int, help="tokens of a document (default: 4096, of evictions 2048, of the speech 1024)"
    )
    parser.add_argument("--samples", type=int, default=1, help="samples of each task, length and depth")
    parser.add_argument("--report", action="store_true", help="measure nothing, make the pages anew")
    parser.add_argument("--fresh", action="store_true", help="forget what was measured before")
    options = parser.parse_args()
    if options.report:
        for board in BOARDS.values():
            print(f"wrote {write(board, Evaluation.load(FOLDER / 'results' / board.name))}")
        return 0
    try:
        folder = test_model_path()
        text = options.text.read_text(encoding="utf-8") if options.text else document()
    except (FetchError, OSError, UnicodeDecodeError) as error:
        print(f"leaderboard: {error}", file=sys.stderr)
        return 1
    board = BOARDS[options.family]
    results = FOLDER / "results" / board.name
    context = options.context or (board.context if options.text else 1024)
    tokens = options.tokens or (board.tokens if options.text else 3 * context)
    if options.fresh:
        shutil.rmtree(results, ignore_errors=True)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    try:
        result = kvpack.evaluate(
            model,
            AutoTokenizer.from_pretrained(folder),
            text,
            methods(options.family, context),
            out=results,
            context=context,
            tokens=tokens,
            samples=options.samples,
            **board.settings(context),
        )
    except kvpack.KvpackError as error:
        print(f"leaderboard: {error}", file=sys.stderr)
        return 2
    print(result)
    print(f"wrote {write(board, result)}")
    return 0


def write(board: Board, result: Evaluation) -> Path:
    """Write a page and its pictures; returns the page."""
    shown = []
    for path in result.save(FOLDER / "results" / board.name):
        if path.suffix == ".png":
            picture = FOLDER / f"{board.name}-{path.name}"
            path.replace(picture)
            shown.append(f"\n![{path.stem}]({picture.name})\n")
        else:
            path.unlink()
    page = FOLDER / f"{board.name}.md"
    page.write_text(board.head + result.markdown() + "".join(shown), encoding="utf-8")
    README.write_text(in_readme(README.read_text(encoding="utf-8"), board, result), encoding="utf-8")
    return page


def in_readme(text: str, board: Board, result: Evaluation) -> str:
    """Return the README with the table of a board in its place."""
    begin, end = f"<!-- {board.name}:begin: by tools/leaderboard.py -->\n", f"<!-- {board.name}:end -->\n"
    before, _, rest = text.partition(begin)
    return before + begin + board.table(result) + end + rest.partition(end)[2]


def bits_table(result: Evaluation) -> str:
    """Return what each codec loses, without bytes and times."""
    rows = {row["method"]: row for row in result.rows}
    lines = ["| method | bits a number | perplexity | KL, nats | same likeliest token |", "|---|---:|---:|---:|---:|"]
    for label, (name, bits) in CODECS.items():
        row = rows[label]
        change = f"{100 * row['perplexity_change']:+.2f} % ({_span(row, 'perplexity_change', '.2f', 100)})"
        agreement = f"{100 * row['agreement']:.2f} %"
        lines.append(f"| {name} | {bits} | {change} | {row['kl']:.1e} ({_span(row, 'kl', '.1e')}) | {agreement} |")
    return "\n".join(lines) + "\n"


def evictions_table(result: Evaluation) -> str:
    """Return what each scorer loses and finds at a quarter and at a tenth of the tokens, the best first."""
    rows = {row["method"]: row for row in result.rows}
    full = rows[FULL]
    lines = [
        "| budget 25 % | perplexity | KL, nats (95 %) | answers | budget 10 %: KL | answers |",
        "|---|---:|---:|---:|---:|---:|",
        f"| full cache | {full['perplexity']:.1f} | 0 | {_answers(result, FULL)} | | |",
    ]
    quarters = [row for label, row in rows.items() if "budget=0.25" in label]
    for row in sorted(quarters, key=lambda row: float(row["kl"])):
        label = row["method"]
        tenth = label.replace("0.25", "0.1")
        kl = f"{row['kl']:.2f} ({_span(row, 'kl', '.2f')})"
        cells = [f"{100 * row['perplexity_change']:+.0f} %", kl, _answers(result, label)]
        cells += [f"{rows[tenth]['kl']:.2f}", _answers(result, tenth)] if tenth in rows else ["", ""]
        lines.append(f"| `{_class_names(label)}` | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _span(row: dict[str, Any], name: str, form: str, factor: int = 1) -> str:
    return f"{factor * row[f'{name}_low']:{form}} to {factor * row[f'{name}_high']:{form}}"


def _answers(result: Evaluation, label: str) -> str:
    scores = [record["score"] for record in result.records if record["kind"] == "task" and record["method"] == label]
    return f"{sum(scores):.0f} of {len(scores)}"


def _class_names(label: str) -> str:
    method = parse_spec(label).options["evict"]
    inner = getattr(method, "method", None)
    return f"{type(method).__name__}({type(inner).__name__})" if inner else type(method).__name__


if __name__ == "__main__":
    sys.exit(main())
