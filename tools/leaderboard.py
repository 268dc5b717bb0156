"""Every registered method at its standard settings, and transformers' own caches beside them, on the test model.

    make leaderboard TEXT=wikitext2-test.txt                        (or: python tools/leaderboard.py --help)
    make leaderboard TEXT=wikitext2-test.txt ARGS="--family evict"

It writes benchmarks/leaderboard.md, or evictions.md, and pictures. Cells that were measured before are kept in
benchmarks/results: a new method costs its own time only; `--fresh` measures everything again.
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
from kvpack.evaluation.contenders import Hqq, Quanto
from kvpack.evaluation.tasks import TASKS
from kvpack.methods.registry import EVICT, QUANTIZE
from test_model import FetchError, document, test_model_path
from transformers import AutoModelForCausalLM, AutoTokenizer

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


@dataclass(frozen=True)
class Board:
    """A page of the leaderboard.

    Attributes:
        name: of its files.
        head: how the page begins.
        context: tokens of a document of the text.
        tokens: of the text that are read.
        settings: of the evaluation, where they are not its defaults.
    """

    name: str
    head: str
    context: int
    tokens: int
    settings: Callable[[int], dict[str, Any]]


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
    ),
}


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
    parser.add_argument("--fresh", action="store_true", help="forget what was measured before")
    options = parser.parse_args()
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
    return page


if __name__ == "__main__":
    sys.exit(main())
