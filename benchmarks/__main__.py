"""Benchmarks of kvpack beside torch, transformers and other runtimes.

Without arguments everything but the peers is measured, and the report written from the results. For example:

    python -m benchmarks --only attention,model    some parts; the others keep their results
    python -m benchmarks --quick                   small sizes, to see that everything works
    python -m benchmarks report                    the report alone, from the results on disk
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from . import attention, kernels, model, peers, report
from .options import Options
from .paths import FOLDER, RESULTS, ROOT
from .progress import Bars
from .results import Part, Results, Rows


@dataclass(frozen=True)
class Step:
    """A part of the benchmarks: what it measures, about how many minutes that takes, how."""

    title: str
    minutes: int
    run: Callable[[Options, Bars], Rows]
    optional: bool = False


STEPS = {
    "kernels": Step("the Rust kernels alone (criterion)", 5, kernels.run),
    "attention": Step("decode attention of one layer, against torch", 8, attention.run_decode),
    "queries": Step("many queries over a packed past, against torch", 2, attention.run_queries),
    "model": Step("the whole model, milliseconds a token", 10, model.run_decode),
    "prefill": Step("prefill of a long prompt, and its peak memory", 2, model.run_prefill),
    "stalls": Step("the longest of many decode steps", 5, model.run_stalls),
    "peers": Step("llama.cpp and OpenVINO on the same model", 25, peers.run, optional=True),
}


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    console = Console()
    # Whoever writes elsewhere must not overwrite the published report.
    folder = FOLDER if options.name == "latest" else RESULTS / options.name
    results_file = RESULTS / f"{options.name}.json"
    results = Results.load(results_file)
    worked = True
    if options.command == "run":
        sizes = Options(options.quick, options.threads, options.peers_python)
        worked = measure(options.only, sizes, results, results_file, console)
    if not results.parts:
        console.print(f"no results in {shown(results_file)}: nothing to report", style="red", highlight=False)
        return 1
    for path in report.write(results, folder):
        console.print(f"wrote {shown(path)}", highlight=False)
    return 0 if worked else 1


def measure(names: list[str], sizes: Options, results: Results, results_file: Path, console: Console) -> bool:
    """Run the parts, each saved as soon as it is there; say whether all of them worked."""
    # It imports torch, which takes seconds: not for a report, or for --help.
    from .environment import OtherPrograms, environment

    console.print(f"[bold]kvpack benchmarks[/] on {report.environment_line(environment(sizes))}")
    for name in names:
        duration = "seconds" if sizes.quick else f"about {STEPS[name].minutes} minutes on two cores"
        console.print(f"  {name}: {STEPS[name].title}; {duration}", highlight=False)
    failed = False
    with Bars(console) as bars:
        for name in names:
            watch = OtherPrograms()
            try:
                rows = STEPS[name].run(sizes, bars)
            except RuntimeError as error:
                console.print(f"{name}: {error}", style="red", markup=False)
                failed = True
                continue
            # Taken anew: the commit, and the date, may differ from the first part's.
            results.parts[name] = Part(environment(sizes) | {"others": watch.share()}, rows)
            results.save(results_file)
    return not failed


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", nargs="?", choices=("run", "report"), default="run")
    parser.add_argument("--only", type=part_names, help=f"parts to run, with commas between: {', '.join(STEPS)}")
    parser.add_argument("--quick", action="store_true", help="small sizes; the numbers say nothing")
    parser.add_argument("--threads", type=thread_counts, help="numbers of threads, with commas (default: 1,2)")
    parser.add_argument("--name", default=None, help="of the results (default: latest, or quick with --quick)")
    parser.add_argument(
        "--peers-python",
        type=Path,
        default=Options.peers_python,
        help="interpreter of the peers' environment (default: %(default)s)",
    )
    options = parser.parse_args(arguments)
    if "KVPACK_NUM_THREADS" in os.environ:
        parser.error("KVPACK_NUM_THREADS is set, expected it unset: the number of threads is what is compared")
    options.name = options.name or ("quick" if options.quick else "latest")
    options.only = options.only or [name for name, step in STEPS.items() if not step.optional]
    options.threads = options.threads or tuple(dict.fromkeys((1, min(2, os.cpu_count() or 1))))
    return options


def part_names(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in STEPS:
            raise argparse.ArgumentTypeError(f"given {name!r}, expected some of {', '.join(STEPS)}")
    return names


def thread_counts(text: str) -> tuple[int, ...]:
    try:
        counts = tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        counts = (0,)
    if counts[0] < 1:
        raise argparse.ArgumentTypeError(f"given {text!r}, expected positive numbers with commas between")
    return counts


def shown(path: Path) -> Path:
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


if __name__ == "__main__":
    sys.exit(main())
