"""(a) The Rust kernels alone: runs criterion and collects its medians."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

from .options import Options
from .paths import ROOT
from .progress import Bars
from .results import Row, Rows


def run(options: Options, bars: Bars) -> Rows:
    """Run `cargo bench` and return a row a benchmark.

    Raises:
        RuntimeError: cargo failed; its message is on the screen.
    """
    bar = bars.add("kernels: cargo bench", total=1)
    start = time.time()
    # The pattern leaves out the crate's unit tests, whose harness does not know criterion's options.
    command = ["cargo", "bench", "--locked", "--bench", "*", "--", "--noplot"]
    if options.quick:
        command += ["--quick", "9-3-64/2048"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"cargo bench failed:\n{done.stderr[-2000:]}")
    bar.advance()
    return collect(Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")) / "criterion", start)


def collect(folder: Path, since: float = 0.0) -> Rows:
    """Return criterion's results below `folder` that were written after `since` (seconds of the epoch)."""
    files = sorted(folder.glob("**/new/estimates.json"))
    return Rows(_row(file) for file in files if file.stat().st_mtime >= since)


def _row(estimates: Path) -> Row:
    about = _read(estimates.with_name("benchmark.json"))
    median = _read(estimates)["median"]
    elements = (about.get("throughput") or {}).get("Elements")
    interval = median["confidence_interval"]
    return {
        "benchmark": about["full_id"],
        "elements": elements,
        "ns": {
            "median": median["point_estimate"],
            "low": interval["lower_bound"],
            "high": interval["upper_bound"],
        },
    }


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
