"""What reading fewer pages (`Quest`) and computing fewer prompt tokens (`LazyLLM`) loses and gains, on the test model.

    python -m benchmarks.fewer quest --text book.txt     KL behind a long text, and the time of attention
    python -m benchmarks.fewer lazy                      pass keys found, and the time to the first token

Each prints the table that the README shows. One thread; ratios are medians of pairs within the run.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import kvpack
import torch
from kvpack.evaluation import tasks
from kvpack.evaluation.contenders import Full, parse
from kvpack.evaluation.forward import Reader, evaluating
from kvpack.evaluation.intervals import of_positive_mean
from kvpack.evaluation.streaming import Expected
from kvpack.forward import CACHE_ARGUMENT
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from .layer_bench import Engine, KvpackLayer, RawLayers, Sampler
from .measure import interleaved
from .paths import ROOT  # noqa: F401  (makes `tools` importable)

TOKENS, STEPS, BLOCK = 8192, 256, 32
SHAPES = ((9, 3, 64), (32, 8, 128))
CODECS = {"Exact": kvpack.Exact(), "KIVI-4": kvpack.KIVI(bits=4), "Q8": kvpack.Q8()}
PAGES = (16, 32, 64, 128)


def main() -> int:
    """Measure one of them and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("quest", "lazy"))
    parser.add_argument("--text", type=Path, help="of the KL: a text of 8192 tokens at least; without it times alone")
    parser.add_argument("--seconds", type=float, default=20.0, help="of sampling, for each shape (default: 20)")
    parser.add_argument("--cases", type=int, default=40, help="pass keys (default: 40)")
    parser.add_argument("--context", type=int, default=3072, help="tokens of a prompt with a pass key (default: 3072)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(lazy(options.cases, options.context) if options.part == "lazy" else quest(options.text, options.seconds))
    return 0


def _model() -> tuple[Any, Any]:
    from test_model import test_model_path

    folder = test_model_path()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="kvpack")
    return model, AutoTokenizer.from_pretrained(folder)


def quest(text: Path | None, seconds: float) -> str:
    """A row a page size: KL of the last steps, and the share of the full attention's time, codec by codec."""
    times = [_attention_times(shape, seconds) for shape in SHAPES]
    losses = _losses(text.read_text(encoding="utf-8")) if text else {}
    lines = [f"| `page=` | KL, nats | {' | '.join(CODECS)} |", "|---|" + "---:|" * (1 + len(CODECS))]
    for page in PAGES:
        cells = [", ".join(f"{time[codec, page]:.2f}" for time in times if (codec, page) in time) for codec in CODECS]
        lines.append(f"| {page} | {losses.get(page, '')} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _attention_times(shape: tuple[int, int, int], seconds: float) -> dict[tuple[str, int], float]:
    """Share of the time of a step's attention over `TOKENS` tokens that reading a quarter of the pages takes."""
    heads, kv_heads, dim = shape
    torch.manual_seed(0)
    raw, query = RawLayers(kv_heads, TOKENS, dim), torch.randn(1, heads, 1, dim)
    samplers = {}
    for name, codec in CODECS.items():
        smallest = {"Exact": 16, "KIVI-4": 32, "Q8": 128}[name]  # a codec packs so many tokens together
        for page in (0, *(page for page in PAGES if page >= smallest)):
            select = kvpack.Quest(budget=0.25, page=page, dense_layers=0) if page else None

            def make(keys: Any, values: Any, codec: Any = codec, select: Any = select) -> KvpackLayer:
                return KvpackLayer(keys, values, codec, select)

            samplers[name, page] = Sampler(Engine(f"{name} {page}", torch.float32, make), raw, query)
    samples = interleaved(samplers, seconds)
    shares = {}
    for (name, page), own in samples.items():
        if page:
            shares[name, page] = statistics.median(a / b for a, b in zip(own, samples[name, 0], strict=True))
    return shares


@torch.no_grad()
def _losses(text: str) -> dict[int, str]:
    """KL to the full cache of the last steps of `TOKENS` tokens; intervals: over blocks of steps."""
    model, tokenizer = _model()
    ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0][:TOKENS]
    if len(ids) < TOKENS:
        raise SystemExit(f"the text: given {len(ids)} tokens, expected at least {TOKENS}")
    readers = {page: Reader(model, parse(f"quest:budget=0.25:page={page}")) for page in PAGES[:3]}
    full, kl = Reader(model, Full()), {page: [] for page in readers}
    with evaluating(model):
        for reader in tqdm((full, *readers.values()), desc="reading"):
            for chunk in ids[: TOKENS - STEPS].split(1024):
                reader(chunk, keep=1)
        for token in tqdm(ids[TOKENS - STEPS : -1], desc="steps"):
            logits = full(token[None]).double()
            expected = Expected.of(logits, logits.logsumexp(-1))
            for page, reader in readers.items():
                logits = reader(token[None]).double()
                kl[page].append(float(expected.kl(logits, logits.logsumexp(-1))))
    return {page: _with_interval(found) for page, found in kl.items()}


def _with_interval(steps: list[float]) -> str:
    blocks = [statistics.fmean(steps[i : i + BLOCK]) for i in range(0, len(steps), BLOCK)]
    low, high = of_positive_mean(blocks)
    return f"{statistics.fmean(steps):.4f} ({low:.4f} to {high:.4f})"


@torch.no_grad()
def lazy(cases: int, context: int) -> str:
    """Pass keys found with and without LazyLLM at its defaults, and how much sooner the first token is there."""
    model, tokenizer = _model()
    found, sooner = {"full": 0, "LazyLLM": 0}, []
    for case in tqdm(range(cases), desc="pass keys"):
        depth = (case + 0.5) / cases
        sample = tasks.build("passkey", tokenizer, tasks.NOISE, context, depth, f"fewer {case}")
        ids, took = torch.tensor([sample.text + sample.question]), {}
        for name in sorted(found, reverse=bool(case % 2)):  # each is first in half of the pairs
            with kvpack.LazyLLM(model) if name == "LazyLLM" else nullcontext():
                answer, took[name] = _answer(model, ids, sample.length)
            found[name] += tasks.score(tokenizer.decode(answer), sample.answers) == 1
        sooner.append(took["full"] / took["LazyLLM"])
    rows = "\n".join(f"| {name} | {right} of {cases} |" for name, right in found.items())
    return (
        f"| | pass keys found in {context} tokens |\n|---|---:|\n{rows}\n\n"
        f"First token {statistics.median(sooner):.2f} times sooner ({min(sooner):.2f} to {max(sooner):.2f})."
    )


def _answer(model: Any, ids: torch.Tensor, length: int) -> tuple[list[int], float]:
    """Greedy tokens, and the seconds until the first one."""
    cache, tokens, start, first = kvpack.PackedCache(model), [], time.perf_counter(), 0.0
    for _ in range(length):
        logits = model(input_ids=ids, use_cache=True, logits_to_keep=1, **{CACHE_ARGUMENT: cache}).logits
        tokens.append(int(logits[0, -1].argmax()))
        first = first or time.perf_counter() - start
        ids = torch.tensor([tokens[-1:]])
    return tokens, first


if __name__ == "__main__":
    sys.exit(main())
