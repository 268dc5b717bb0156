"""What a calibration is asked for, checked before the model is needed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from .. import _kvpack
from ..errors import ModelNeededError, OptionError
from ..evaluation.forward import evaluating
from ..evaluation.settings import Settings, check_folder, cut
from ..methods import Calibrated, KVQuant
from ..methods.file import Header, identity, write
from ..methods.quantize.calibrated import table_tensors
from ..methods.spec import parse_spec
from . import kvquant
from .budget import CHUNK, sides
from .losses import measure_losses, range_of_bits, spend, text_of
from .prune_plan import HeadsPlan, SlicePlan, plan_of

# Pages that are full: sinks, blocks of 128 tokens and a window of 128; then the tokens that are predicted.
_PAGES = 4 + 7 * 128 + 128


@dataclass(frozen=True)
class Plan:
    """A calibration that can begin.

    Attributes:
        method: as it was given.
        documents: `[n, context]` token ids.
        out: the file.
        budget: bits a number; None for KVQuant.
        gradients: for KVQuant.
        text: a hash of what is read.
    """

    method: str
    documents: Tensor
    out: Path
    budget: float | None
    gradients: bool
    text: str

    def run(self, model: Any, progress: bool) -> Calibrated:
        """Measure, choose and write."""
        from tqdm.auto import tqdm

        measure = self._tables if self.budget is None else self._bits
        with tqdm(total=self._work(model), unit="token", unit_scale=True, disable=not progress) as bar:
            header, tensors = measure(model, bar.update)
        about = {
            "kvpack": _kvpack.__version__,
            "model": identity(model),
            "text": self.text,
            "tokens": self.documents.numel(),
        }
        write(self.out, {**about, **header}, tensors)
        return Calibrated(str(self.out))

    def _work(self, model: Any) -> int:
        if self.budget is None:
            return int(self.documents.numel())
        layers = int(model.config.get_text_config(decoder=True).num_hidden_layers)
        widths = sum(len(side.widths) for side in sides(self.method))
        trials = 1 + widths * layers + 2
        count = int(self.documents.shape[0])
        return count * (widths * (int(self.documents.shape[1]) - CHUNK) + trials * CHUNK)

    def _tables(self, model: Any, progress: Callable[[int], object]) -> tuple[Header, dict[str, Tensor]]:
        codec = _kvquant(self.method)
        attention = model.config._attn_implementation
        training = model.training
        model.eval()
        if attention == "kvpack":
            model.set_attn_implementation("sdpa")
        try:
            documents = [document[None] for document in self.documents]
            tables = kvquant.measure(model, documents, codec, gradients=self.gradients, progress=progress)
        finally:
            model.set_attn_implementation(attention)
            model.train(training)
        options = {name: getattr(codec, name) for name in ("bits", "outliers", "norm", "window", "sinks")}
        header = {
            "method": "kvquant",
            "options": options,
            "gradients": self.gradients,
            "layers": [str(layer) for layer in tables],
        }
        return header, table_tensors(tables)

    def _bits(self, model: Any, progress: Callable[[int], object]) -> tuple[Header, dict[str, Tensor]]:
        both = sides(self.method)
        budget = cast("float", self.budget)
        with evaluating(model):
            losses = measure_losses(model, self.documents, both, progress)
            chosen = spend(losses, budget)
            report = losses.compare(model, self.documents, both, chosen, budget, progress)
        layers = {str(layer): text_of(both, widths) for layer, widths in chosen.items()}
        header = {"method": "bits", "of": self.method, "budget": budget, "layers": layers, "report": report}
        return header, losses.tensors()


def prepare(
    config: Any, tokenizer: Any, text: str, method: str, out: Path, options: dict[str, Any]
) -> Plan | HeadsPlan | SlicePlan:
    """Check everything that can be wrong.

    Raises:
        OptionError: something is.
    """
    budget = options["budget"]
    if not isinstance(method, str):
        raise OptionError(
            f"method={method!r} is not accepted; accepted: 'heads', 'slice', or a codec as text, such as 'graded'"
        )
    of_heads = plan_of(method, budget, bool(options["gradients"]))
    is_kvquant = method.strip().startswith(KVQuant.name)
    if is_kvquant:
        _kvquant(method)
        if budget is not None:
            raise OptionError(f"budget={budget!r} is not accepted with kvquant, whose layers all have the same bits")
    elif of_heads is None:
        _check_budget(method, budget, config)
    tables = 6 if is_kvquant else 0 if of_heads is None else 4  # documents of what is no search for bits
    context, documents = _sizes(config, tables, options)
    check_folder(out.parent)
    if out.is_dir():
        raise OptionError(f"out: {out} is a folder, expected a file")
    settings = Settings(context=context, tokens=context * documents, greedy=0, costs=False)
    settings.check_model(config)
    found = cut(text, tokenizer, settings)
    if of_heads is not None:
        return of_heads(found.documents, out, found.sha256[:16])
    return Plan(method, found.documents, out, budget, bool(options["gradients"]), found.sha256[:16])


def _sizes(config: Any, tables: int, options: dict[str, Any]) -> tuple[int, int]:
    text_config = config.get_text_config(decoder=True)
    longest = getattr(text_config, "max_position_embeddings", None) or 2048
    usual = (min(2048, longest), tables) if tables else (_PAGES + CHUNK, 2)
    given = (options["context"], options["documents"])
    context, documents = (standard if x is None else x for x, standard in zip(given, usual, strict=True))
    least = 64 if tables else CHUNK + 256
    for name, value, low in (("context", context, least), ("documents", documents, 1)):
        if not isinstance(value, int) or isinstance(value, bool) or value < low:
            raise OptionError(f"{name}={value!r} is not accepted; accepted: whole numbers from {low}")
    return context, documents


def _kvquant(method: str) -> KVQuant:
    codec = parse_spec(method).options.get("quantize")
    if not isinstance(codec, KVQuant):
        raise OptionError(f"method {method!r} is not accepted; accepted: kvquant with its parameters alone")
    return codec


def _check_budget(method: str, budget: Any, config: Any) -> None:
    both = sides(method)
    if not isinstance(budget, int | float) or isinstance(budget, bool):
        raise OptionError(f"budget={budget!r} is not accepted; accepted: bits a number, such as 3.0")
    try:
        least, most = range_of_bits(config, both)
    except ModelNeededError:
        return  # it is found out when it is spent
    if not least - 1e-9 <= budget <= most + 1e-9:
        raise OptionError(
            f"budget={budget!r} is not accepted; accepted: {least:.3f} to {most:.3f} bits a number, scales included: "
            f"what the narrowest and the widest codes of {method!r} take"
        )
