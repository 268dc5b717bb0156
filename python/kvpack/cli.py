"""The command line: `kvpack eval`, `kvpack calibrate`, `kvpack report`, `kvpack inspect`, `kvpack info`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, ParamSpec

from . import _kvpack
from ._eval_requirements import matplotlib, typer
from .errors import KvpackError, OptionError

# Without a display, as on a server.
matplotlib.use("agg")
P = ParamSpec("P")
# Options of more than one command.
Model = Annotated[str, typer.Option(help="folder or hub name of a causal language model")]
TextFile = Annotated[Path, typer.Option(help="a text in UTF-8")]
Dtype = Annotated[str, typer.Option(help="the model's dtype")]

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Small and fast KV caches for transformers models on CPUs.",
)


def _plain(command: Callable[P, None]) -> Callable[P, None]:
    """Mistakes are one line on stderr and exit code 2; Ctrl-C is 130."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except KvpackError as error:
            typer.echo(f"kvpack: {error}", err=True)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            typer.echo("kvpack: stopped; `kvpack eval` goes on from here when it is started again", err=True)
            raise typer.Exit(130) from None

    return run


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"kvpack {_kvpack.__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="say the version and exit")
    ] = False,
) -> None:
    pass


@app.command("eval")
@_plain
def evaluate(
    model: Model,
    text: TextFile,
    out: Annotated[Path, typer.Option(help="folder for the results; what is there already is not measured again")],
    methods: Annotated[
        str, typer.Option(help="names with commas between, such as exact,kivi:bits=2, or a YAML file")
    ] = "exact,kivi:bits=8,kivi:bits=4,kivi:bits=2",
    context: Annotated[int, typer.Option(help="tokens of a document")] = 2048,
    tokens: Annotated[int, typer.Option(help="tokens of the text to read")] = 16_384,
    chunk: Annotated[int, typer.Option(help="tokens fed at once")] = 128,
    tasks: Annotated[str, typer.Option(help="retrieval tasks, with commas between; 'all' for all of them")] = "",
    task_contexts: Annotated[
        str, typer.Option(help="their lengths (default: a quarter, half and all of context)")
    ] = "",
    samples: Annotated[int, typer.Option(help="samples of each task, length and depth")] = 2,
    filler: Annotated[
        str, typer.Option(help="what tasks are hidden in: noise (the same sentences), or text")
    ] = "noise",
    ask: Annotated[
        str, typer.Option(help="when their question is read: after the text was packed, or with it")
    ] = "after",
    greedy: Annotated[int, typer.Option(help="tokens of the greedy continuations; 0 leaves them out")] = 64,
    dtype: Dtype = "float32",
    seed: Annotated[int, typer.Option(help="of the tasks")] = 0,
    threads: Annotated[int, typer.Option(min=0, help="of torch and kvpack; 0 leaves torch its choice")] = 0,
) -> None:
    """Measure what methods lose and what they gain: a table, pictures and every number.

    A run that was ended goes on where it stopped when it is started again with the same options.
    """
    import torch

    from .evaluation import TASKS
    from .evaluation.plan import prepare

    # All that can be wrong is found before the model is loaded.
    if filler not in ("noise", "text"):
        raise OptionError(f"filler={filler!r} is not accepted; accepted: noise, text")
    chosen, words = _dtype(dtype), _read(text)
    config, tokenizer = _describe(model)
    settings = {
        "context": context,
        "tokens": tokens,
        "chunk": chunk,
        "greedy": greedy,
        "seed": seed,
        "samples": samples,
        "filler": filler,
        "ask": ask,
        "tasks": tuple(TASKS) if tasks == "all" else _names(tasks),
        "task_contexts": tuple(map(_whole, _names(task_contexts))),
    }
    plan = prepare(config, tokenizer, words, methods, out, dtype, settings)
    if threads:
        torch.set_num_threads(threads)
    result = plan.run(_load(model, chosen))
    typer.echo(str(result))
    for path in result.save(out):
        typer.echo(f"wrote {path}")


@app.command()
@_plain
def calibrate(
    model: Model,
    text: TextFile,
    out: Annotated[Path, typer.Option(help="the file to write")],
    method: Annotated[
        str,
        typer.Option(
            help="heads; slice; kvquant:bits=3; or a codec without its bits: graded, kivi, rotated, kivi/rotated"
        ),
    ] = "graded",
    budget: Annotated[
        str | None,
        typer.Option(
            help="mean bits a number, scales included; of heads 25% (of the bytes) or 0.02nats; of slice the mean rank"
        ),
    ] = None,
    bytes_per_token: Annotated[
        float | None, typer.Option(help="the same as bytes of a packed token, in all layers together")
    ] = None,
    gradients: Annotated[bool, typer.Option(help="weigh KVQuant's errors with the loss' gradients")] = True,
    context: Annotated[int | None, typer.Option(help="tokens of a document")] = None,
    documents: Annotated[int | None, typer.Option(help="how many are read")] = None,
    dtype: Dtype = "float32",
) -> None:
    """Find out what a method wants to know of a model, which layers need how many bits, or which KV heads their past.

    Use it as `PackedCache(model, quantize=kvpack.load_calibration(FILE))`, or in `kvpack eval` as
    `calibrated:path=FILE`; of heads as `prune=kvpack.Heads(calibration=FILE)`, `heads:calibration=FILE:demote=0.5`.
    """
    from . import plot
    from .calibration.plan import prepare
    from .methods import Heads

    chosen, words = _dtype(dtype), _read(text)
    config, tokenizer = _describe(model)
    if bytes_per_token is not None:
        if budget is not None:
            raise OptionError("bytes-per-token is not accepted together with budget; accepted: one of them")
        budget = str(_bits_of(bytes_per_token, config))
    options = {"budget": _number(budget), "gradients": gradients, "context": context, "documents": documents}
    plan = prepare(config, tokenizer, words, method, out, options)
    found = plan.run(_load(model, chosen), progress=True)
    typer.echo(found.words())
    typer.echo(f"wrote {out}")
    if isinstance(found, Heads):
        picture = out.with_suffix(".png")
        plot.heads(found).savefig(picture, dpi=150)
        typer.echo(f"wrote {picture}")


def _number(text: str | None) -> float | str | None:
    """A budget: a number of bits, or something else as text."""
    try:
        return None if text is None else float(text)
    except ValueError:
        return text


def _bits_of(bytes_per_token: float, config: Any) -> float:
    """Bits a number when a token has so many bytes."""
    text = config.get_text_config(decoder=True)
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    numbers: int = 2 * text.num_hidden_layers * heads * dim
    return 8 * bytes_per_token / numbers


@app.command()
@_plain
def report(folder: Annotated[Path, typer.Argument(help="the folder that `kvpack eval` wrote")]) -> None:
    """Make the table and the pictures again from the numbers."""
    from .evaluation import Evaluation

    result = Evaluation.load(folder)
    typer.echo(str(result))
    for path in result.save(folder):
        typer.echo(f"wrote {path}")


@app.command("inspect")
@_plain
def look(
    model: Model,
    text: TextFile,
    out: Annotated[Path, typer.Option(help="folder for inspect.md, inspect.png and inspect.json")],
    tokens: Annotated[int, typer.Option(help="tokens of the text to read")] = 1024,
    dtype: Dtype = "float32",
) -> None:
    """Say what a model's cache is like, and which families of methods fit it."""
    from .evaluation.inspect import inspect
    from .evaluation.settings import Settings, check_folder, cut

    chosen = _dtype(dtype)
    words = _read(text)
    check_folder(out)
    config, tokenizer = _describe(model)
    settings = Settings(context=tokens, tokens=tokens, greedy=0, costs=False)
    settings.check_model(config)
    ids = cut(words, tokenizer, settings).documents[0]
    found = inspect(_load(model, chosen), ids)
    typer.echo(found.words())
    for path in found.save(out):
        typer.echo(f"wrote {path}")


@app.command()
@_plain
def info() -> None:
    """Say which instruction set and threads are in use."""
    import kvpack

    for name, value in kvpack.info().items():
        typer.echo(f"{name}: {value}")


def _load(model: str, dtype: Any) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    except (OSError, ValueError) as error:
        raise OptionError(f"model: {model!r} cannot be loaded as a causal language model: {error}") from None


def _describe(model: str) -> tuple[Any, Any]:
    """The model's configuration and tokenizer."""
    from transformers import AutoConfig, AutoTokenizer

    try:
        config = AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise OptionError(f"model: {model!r} has no configuration that transformers can load: {error}") from None
    if config.is_encoder_decoder:
        raise OptionError(f"model: {model!r} is an encoder-decoder model, expected a causal language model")
    try:
        return config, AutoTokenizer.from_pretrained(model)
    except Exception as error:  # whatever a tokenizer's own code raises
        raise OptionError(f"model: {model!r} has no tokenizer that transformers can load: {error}") from None


def _dtype(name: str) -> Any:
    import torch

    accepted = ("float32", "bfloat16", "float16")
    if name not in accepted:
        raise OptionError(f"dtype={name!r} is not accepted; accepted: {', '.join(accepted)}")
    return getattr(torch, name)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"text: {path} cannot be read: {error}") from None


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise OptionError(f"task-contexts: given {text!r}, expected whole numbers with commas between") from None


if __name__ == "__main__":
    app()
