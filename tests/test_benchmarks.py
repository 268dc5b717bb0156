"""The benchmarks' report, from results that are made up; what they measure is not a test's business."""

from __future__ import annotations

import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import attention, model, report, tables
from benchmarks.__main__ import parse
from benchmarks.measure import interleaved, spread
from benchmarks.options import Options
from benchmarks.paths import ROOT
from benchmarks.players import Player, play
from benchmarks.results import Part, Results, Rows
from benchmarks.targets import Cell, Target, context_cost, targets
from benchmarks.worker import Worker, WorkerError

ENVIRONMENT = {
    "date": "2026-01-02T03:04:05+00:00",
    "cpu": "Some CPU",
    "cpus": 2,
    "cpu_flags": ["avx2"],
    "python": "3.11.1",
    "torch": "2.6.0",
    "transformers": "5.4.0",
    "kvpack": {"version": "0.1.0", "isa": "avx2"},
    "compared": {"hqq": "0.2.8"},
    "commit": "0123456789",
    "threads": [1, 2],
    "quick": False,
    "others": 0.01,
}
CONTEXTS = (512, 8064)


def about(median: float) -> dict[str, float]:
    return spread([0.9 * median, median, 1.2 * median])


def layer_row(engine: str, shape: tuple[int, ...], tokens: int, threads: int, faster: float) -> dict[str, Any]:
    ns = about(300 * tokens / threads / faster)
    where = {"engine": engine, "shape": list(shape), "tokens": tokens, "new": 1, "threads": threads}
    return where | {"ns": ns, "layer_bytes": 768 * tokens, "bandwidth": about(20.0)}


def model_row(engine: str, context: int, threads: int, at_no_context: float, each: float) -> dict[str, Any]:
    ms = about(at_no_context + each * context / 1000)
    return {"engine": engine, "context": context, "threads": threads, "layers": 30, "ms": ms}


@pytest.fixture
def results() -> Results:
    """Every part, with a head shape of two that the goals ask for, and an engine or two that are missing."""
    faster = dict.fromkeys((*attention.TORCH, *attention.DYNAMIC), 1.0) | dict.fromkeys(attention.PACKED, 13.0)
    threads, shape = (1, 2), (9, 3, 64)
    layers = Rows(
        layer_row(engine, shape, tokens, count, ratio)
        for tokens, count, (engine, ratio) in product((2048, 8192, 32_768, 131_072), threads, faster.items())
    )
    small = Rows(layer_row(engine, shape, 128, count, 10) for count, engine in product(threads, attention.SMALL))
    queries = Rows(row | {"new": 64, "tokens": 8256} for row in layers.where(tokens=8192))
    each = {"DynamicCache": 10.0, "Exact": 2.0, "KIVI-4": 0.5, "KIVI-2": 0.5, "HF hqq-4": 20.0}
    whole = Rows(
        {"dtype": "float32"} | model_row(engine, context, count, 20.0, slope)
        for count, context, (engine, slope) in product(threads, CONTEXTS, each.items())
    )
    missing = {"engine": "HF quanto-4", "missing": "not installed", "dtype": "float32"}
    whole += [missing | {"context": context, "threads": count} for context, count in product(CONTEXTS, threads)]
    ours = {f"{engine} float32": slope for engine, slope in each.items() if engine in model.FEW}
    peers = Rows(
        model_row(engine, context, count, 10.0, slope)
        for count, context, (engine, slope) in product(
            threads, CONTEXTS, (ours | {"llama.cpp f16, flash": 4.0, "llama.cpp q4_0, flash": 9.0}).items()
        )
    )
    prefill = Rows({"engine": engine, "tokens": 4096, "seconds": about(5.0), "peak_bytes": 9} for engine in model.FEW)
    longest = [{"step": 7, "ms": 12.0}]
    stalls = Rows({"engine": engine, "ms": about(10.0), "longest": longest} for engine in model.FEW)
    kernels = Rows([{"benchmark": "exact/8", "elements": 8, "ns": {"median": 8.0, "low": 7.0, "high": 9.0}}])
    rows = {"attention": small + layers, "queries": queries, "model": whole, "prefill": prefill}
    rows |= {"stalls": stalls, "peers": peers, "kernels": kernels}
    return Results({name: Part(ENVIRONMENT, Rows(of_part)) for name, of_part in rows.items()})


def found(results: Results, what: str) -> Target:
    return next(target for target in targets(results) if target.what.startswith(what))


def test_a_verdict_says_by_how_much_a_goal_is_missed() -> None:
    least = Target("speed", 10, (Cell("a", 12.0), Cell("b", 8.0), Cell("c", None)))
    assert [least.verdict(cell) for cell in least.cells] == ["met", "missed by 20 %", "not measured"]
    assert least.count() == (1, 2)
    assert least.worst() == Cell("b", 8.0)
    most = Target("time", 2, (Cell("a", 1.0), Cell("b", 3.0)), least=False)
    assert [most.verdict(cell) for cell in most.cells] == ["met", "missed by 50 %"]
    even = Target("no slower", 1, (Cell("a", 0.99), Cell("b", 0.9)), noise=0.02)
    assert [even.verdict(cell) for cell in even.cells] == ["met within noise", "missed by 10 %"]
    assert even.count() == (1, 2)


def test_goals_are_computed_within_a_part(results: Results) -> None:
    assert [cell.value for cell in found(results, "KIVI-4 against torch SDPA float32, 9/3/64").cells] == [
        pytest.approx(13),
        pytest.approx(13),
    ]
    absent = found(results, "KIVI-4 against torch SDPA float32, 32/8/128")
    assert [absent.verdict(cell) for cell in absent.cells] == ["not measured"] * 2
    assert found(results, "Two threads against one, 32k").count() == (6, 6)
    assert found(results, "Two threads against one, every size").count() == (26, 26)
    assert found(results, "Time a token at 128k").count() == (12, 12)
    assert found(results, "Whole model float32, KIVI-4").cells[0].value == pytest.approx(100.64 / 24.032)
    assert found(results, "Whole model against HF quanto-4").count() == (0, 0)
    assert found(results, "Longest step").cells[0].value == pytest.approx(1.2)


def test_what_context_costs_is_compared_with_the_best_setting_of_llama(results: Results) -> None:
    cost = context_cost(results.rows("peers"), "llama.cpp f16, flash", 1)
    assert cost == pytest.approx(1e6 * 4.0 / 1000 / 30)
    values = {cell.where: cell.value for cell in found(results, "What context costs").cells}
    assert values["KIVI-4 float32, 1 thread"] == pytest.approx(8)
    assert values["Exact float32, 2 threads"] == pytest.approx(2)
    assert values["Exact bfloat16, 2 threads"] is None


def test_the_report_is_written_from_the_results_on_disk(results: Results, tmp_path: Path) -> None:
    results.save(tmp_path / "results.json")
    loaded = Results.load(tmp_path / "results.json")
    assert loaded == results
    written = report.write(loaded, tmp_path / "report")
    assert [path.name for path in written] == ["README.md", "attention.png", "model.png"]
    assert all(path.stat().st_size > 1000 for path in written)
    text = written[0].read_text(encoding="utf-8")
    assert "Some CPU" in text
    assert "not installed" in text
    assert "Not measured yet" not in text
    assert all(f"## {section.title}" in text for section in report.SECTIONS.values())


def test_parts_that_were_not_run_are_named() -> None:
    text = report.text(Results())
    assert text.count("Not measured yet") == len(report.SECTIONS)


def test_a_part_of_the_results_is_enough(results: Results, tmp_path: Path) -> None:
    for name, part in results:
        report.write(Results({name: part}), tmp_path / name)


def test_tables_give_medians_with_their_spread(results: Results) -> None:
    text = "\n".join(tables.decode(results.rows("attention")))
    assert "| KIVI-4 | 768 | 23.1 (21.2-26.8) **13.0x** |" in text
    assert "| exact | 1.00 (0.88-1.12) |" in "\n".join(tables.kernels(results.rows("kernels")))


def test_engines_take_turns() -> None:
    turns: list[str] = []
    samplers = {name: lambda name=name: turns.append(name) or 1.0 for name in "ab"}
    samples = interleaved(samplers, seconds=0.0)
    assert turns == ["a", "b"] * 6
    assert samples == {"a": [1.0] * 5, "b": [1.0] * 5}


def test_a_player_that_fails_leaves_a_row_that_says_why() -> None:
    class Fake:
        def call(self, method: str, *, fail: bool, **_: Any) -> list[float] | None:
            if fail and method == "steps":
                raise WorkerError("cannot open /some/folder/file.so")
            return [1.0, 2.0] if method == "steps" else None

    players = [Player(name, Fake(), {"fail": name == "bad"}) for name in ("good", "bad")]  # type: ignore[arg-type]
    good, bad = play(players, 512, Options(quick=True), advance=lambda: None)
    assert good == {"engine": "good", "context": 512, "ms": spread([1.0, 2.0, 1.0, 2.0])}
    assert bad == {"engine": "bad", "context": 512, "missing": "cannot open file.so"}


def test_a_worker_is_an_object_in_another_process() -> None:
    with Worker("collections:Counter", threads=2, more=5) as worker:
        assert worker.call("most_common", n=1) == [["more", 5]]
        with pytest.raises(WorkerError, match="AttributeError"):
            worker.call("least_common")
        assert worker.call("total") == 7
    with pytest.raises(WorkerError, match="ModuleNotFoundError"):
        Worker("no_such_module:Thing", threads=1)


def test_the_command_line_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    command = [sys.executable, "-m", "benchmarks", "--help"]
    assert "--quick" in subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    with pytest.raises(SystemExit):
        parse(["--only", "speed"])
    assert "given 'speed', expected some of kernels" in capsys.readouterr().err
