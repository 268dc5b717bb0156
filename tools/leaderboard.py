"""Every registered method at its standard settings, and transformers' own caches beside them, on the test model.

    make leaderboard TEXT=wikitext2-test.txt        (or: python tools/leaderboard.py --help)

It writes benchmarks/leaderboard.md and its pictures. Cells that were measured before are kept in
benchmarks/results/leaderboard: a new method costs its own time only; `--fresh` measures everything again.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

import kvpack
import torch
from kvpack.evaluation.contenders import Hqq, Quanto
from kvpack.evaluation.tasks import TASKS
from kvpack.methods.spec import standard_settings
from test_model import FetchError, document, test_model_path
from transformers import AutoModelForCausalLM, AutoTokenizer

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
RESULTS = FOLDER / "results" / "leaderboard"
TABLE = FOLDER / "leaderboard.md"
HEAD = """# Leaderboard

Every registered method at its standard settings, beside the full cache, a cache that only keeps a window, and
transformers' own quantised caches. `make leaderboard TEXT=...` measures what is new and writes this page; the numbers
of every cell are in `results/leaderboard`.

"""


def methods(context: int) -> list[str]:
    """Return what is compared: the registry's methods, and the references that are installed."""
    installed = [
        f"{backend.backend}:bits={bits}" for backend in (Hqq, Quanto) if backend.installed() for bits in (4, 2)
    ]
    return [*standard_settings(), *installed, f"window:tokens={context // 4}"]


def main() -> int:
    """Measure and write."""
    parser = argparse.ArgumentParser(description="Compare all methods on the test model.")
    parser.add_argument("--text", type=Path, help="a text in UTF-8 (default: a speech of 1941, of 4000 tokens)")
    parser.add_argument("--tokens", type=int, help="tokens to read (default: 32768, or what the speech has)")
    parser.add_argument("--context", type=int, help="tokens of a document (default: 4096, of the speech 1024)")
    parser.add_argument("--samples", type=int, default=1, help="samples of each task, length and depth")
    parser.add_argument("--fresh", action="store_true", help="forget what was measured before")
    options = parser.parse_args()
    try:
        folder = test_model_path()
        text = options.text.read_text(encoding="utf-8") if options.text else document()
    except (FetchError, OSError, UnicodeDecodeError) as error:
        print(f"leaderboard: {error}", file=sys.stderr)
        return 1
    context = options.context or (4096 if options.text else 1024)
    tokens = options.tokens or (32_768 if options.text else 3 * context)
    if options.fresh:
        shutil.rmtree(RESULTS, ignore_errors=True)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    try:
        result = kvpack.evaluate(
            model,
            AutoTokenizer.from_pretrained(folder),
            text,
            methods(context),
            out=RESULTS,
            context=context,
            tokens=tokens,
            tasks=tuple(TASKS),
            task_contexts=(context // 4, context * 3 // 4),
            depths=(0.1, 0.5, 0.9),
            samples=options.samples,
        )
    except kvpack.KvpackError as error:
        print(f"leaderboard: {error}", file=sys.stderr)
        return 2
    print(result)
    shown = []
    for path in result.save(RESULTS):
        if path.suffix == ".png":
            picture = FOLDER / f"leaderboard-{path.name}"
            path.replace(picture)
            shown.append(f"\n![{path.stem}]({picture.name})\n")
        else:
            path.unlink()
    TABLE.write_text(HEAD + result.markdown() + "".join(shown), encoding="utf-8")
    print(f"wrote {TABLE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
