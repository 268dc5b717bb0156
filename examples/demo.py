"""The demo: one long prompt through transformers' DynamicCache and through kvpack's packed caches.

    make demo                       (or: python examples/demo.py --help)

SmolLM2-135M-Instruct reads a speech of more than 3000 tokens and summarises it. Two runs:

1. Teacher-forced: all caches are alive at once and decode the same tokens, one step of each in turn.
   It gives the bytes held, the time per token and the KL divergence to the full cache.
2. Free: `model.generate` from the bare prompt, in rounds in which every cache has its turn.
   It gives the time to the first token, and in the last round the answers.

Answers are shown and not compared: where two tokens are almost equally likely, another CPU's rounding chooses the
other one, and the rest of the text with it. The KL divergence knows no such ties.

It prints a table and leaves demo.json, demo.md and demo.png in the output folder: four minutes on two cores.
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))

import torch
from demo_environment import OtherPrograms, environment
from demo_measure import ENGINES, attention_layers, generate, prefill, teacher_forced
from demo_picture import draw
from demo_report import Report
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from test_model import FetchError, document, test_model_path
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

ROOT = Path(__file__).resolve().parents[1]
QUESTION = "Summarize this speech in one paragraph."


def main() -> int:
    options = parse_arguments()
    console = Console()
    if options.threads:
        torch.set_num_threads(options.threads)
    transformers_logging.disable_progress_bar()

    surroundings = environment(ROOT)
    console.print(f"[bold]kvpack demo[/] on {surroundings['cpu']}, {surroundings['threads']} threads")
    try:
        folder = options.model or str(test_model_path())
        text = options.text.read_text(encoding="utf-8") if options.text else document()
    except (FetchError, OSError, UnicodeDecodeError) as error:
        console.print(f"demo: {error}", style="red")
        return 1
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = build_prompt(tokenizer, text, options.question, options.context)
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit and prompt.shape[1] + options.tokens > limit:
        console.print(f"demo: the model takes {limit} tokens; lower --context or --tokens", style="red")
        return 1
    console.print(f"model {Path(folder).name}, prompt of {prompt.shape[1]} tokens, {options.tokens} tokens to decode")

    with progress_bars(console) as bars:
        watch = OtherPrograms()
        forced = run_teacher_forced(bars, model, prompt, options)
        run_free(bars, model, prompt, options, forced.results)
        surroundings["other_programs"] = watch.share()

    report = Report(Path(folder).name, options.question, surroundings, model.config, forced)
    report.print(console, tokenizer)
    options.out.mkdir(parents=True, exist_ok=True)
    report.write_json(options.out / "demo.json", tokenizer)
    report.write_markdown(options.out / "demo.md")
    draw(report, options.out / "demo.png")
    for name in ("demo.png", "demo.md", "demo.json"):
        console.print(f"wrote {options.out / name}", highlight=False)
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Compare kvpack's caches with DynamicCache on one long prompt.",
        formatter_class=Defaults,
    )
    parser.add_argument("--model", help="folder or name of a causal language model (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--text", type=Path, help="a UTF-8 text file to read (default: a speech of 1941)")
    parser.add_argument("--question", default=QUESTION, help="what is asked at the end of the text")
    parser.add_argument("--tokens", type=positive, default=48, help="tokens to decode")
    parser.add_argument("--context", type=positive, default=3600, help="tokens of the text to keep")
    parser.add_argument("--rounds", type=positive, default=3, help="prompts read by each cache, for its first token")
    parser.add_argument("--threads", type=positive, help="threads for torch and kvpack (default: torch's choice)")
    parser.add_argument("--out", type=Path, default=Path("demo-output"), help="folder for the files it writes")
    parser.add_argument("--seed", type=int, default=0, help="of the order in which the caches take their turns")
    options = parser.parse_args()
    if options.tokens < 2:
        parser.error("--tokens: at least 2 are needed for a spread")
    return options


class Defaults(argparse.ArgumentDefaultsHelpFormatter):
    """Adds the default to the help of each option that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a positive number")
    return value


def build_prompt(tokenizer: Any, text: str, question: str, context: int) -> torch.Tensor:
    """Return the token ids [1, n] of the first `context` tokens of `text` and the question, as a chat."""
    kept = tokenizer(text, add_special_tokens=False).input_ids[:context]
    content = f"{tokenizer.decode(kept)}\n\n{question}"
    if tokenizer.chat_template:
        chat = [{"role": "user", "content": content}]
        content = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    return tokenizer(content, add_special_tokens=not tokenizer.chat_template, return_tensors="pt").input_ids


def progress_bars(console: Console) -> Progress:
    columns = (TextColumn("{task.description:<34}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console)


def run_teacher_forced(bars: Progress, model: Any, prompt: torch.Tensor, options: argparse.Namespace) -> Any:
    reading = bars.add_task("prefill (layers)", total=len(attention_layers(model)))
    full, logits = prefill(model, prompt, lambda: bars.advance(reading))
    turns = bars.add_task("decode, all caches in turn (steps)", total=options.tokens * (len(ENGINES) + 1))
    return teacher_forced(model, full, logits, options.tokens, options.seed, lambda: bars.advance(turns))


def run_free(
    bars: Progress, model: Any, prompt: torch.Tensor, options: argparse.Namespace, results: dict[str, Any]
) -> None:
    """Generate a token in each round, and the whole answer in the last; the order of the caches is shuffled anew."""
    shuffler = random.Random(options.seed)
    reading = bars.add_task("generate, all caches in turn (prompts)", total=options.rounds * len(ENGINES))
    for round_ in range(options.rounds):
        last = round_ == options.rounds - 1
        for engine in shuffler.sample(ENGINES, len(ENGINES)):
            generate(model, engine, prompt, options.tokens if last else 1, results[engine.name])
            bars.advance(reading)


if __name__ == "__main__":
    sys.exit(main())
