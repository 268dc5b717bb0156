"""`make conformance`: runs every architecture of transformers, tiny and random, and writes a table of what is right."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from tqdm import tqdm

from . import models, table
from .run import read, run

ROOT = Path(__file__).resolve().parents[2]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="conformance", description=__doc__)
    parser.add_argument("--only", help="model types, with commas between them")
    parser.add_argument("--kinds", default=",".join(models.KINDS), help="kinds of heads (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=1, help="processes at a time (default: %(default)s)")
    parser.add_argument("--limit-seconds", type=float, default=120, help="for a model (default: %(default)s)")
    parser.add_argument("--results", type=Path, help="a file of JSON lines (default: by the release of transformers)")
    parser.add_argument("--table", type=Path, help="the table (default: docs/conformance.md, of all models alone)")
    parser.add_argument("--resume", action="store_true", help="leave out what the results have already")
    return parser.parse_args()


def main() -> int:
    given = arguments()
    only = None if given.only is None else given.only.split(",")
    jobs = [job for job in models.all_models(tuple(given.kinds.split(","))) if only is None or job[0] in only]
    unknown = sorted(set(only or ()) - {model_type for model_type, _ in jobs})
    if unknown:
        print(f"--only: given {', '.join(unknown)}, which this transformers does not have", file=sys.stderr)
        return 2
    results = given.results or ROOT / "target" / f"conformance-{table.versions()['transformers']}.jsonl"
    results.parent.mkdir(parents=True, exist_ok=True)
    known = read(results) if given.resume else {}
    if not given.resume and only is None:
        results.unlink(missing_ok=True)
    rows = []
    with results.open("a") as out, tqdm(total=len(jobs), unit="model") as bar:
        bar.update(sum(job in known for job in jobs))
        for row in run([job for job in jobs if job not in known], given.workers, given.limit_seconds):
            print(json.dumps(row), file=out, flush=True)
            rows.append(row)
            bar.set_postfix_str(f"{row['model']} {row['verdict']}")
            bar.update()
            if row["verdict"] == "wrong" or only is not None:
                bar.write(table.told(row))
    everything = read(results)
    rows = [everything[job] for job in jobs if job in everything]
    print(table.totals(rows))
    if only is None:
        path = given.table or ROOT / "docs" / "conformance.md"
        path.write_text(table.page(rows))
        print(f"{len(rows)} models: {path}")
    return int(any(row["verdict"] == "wrong" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
