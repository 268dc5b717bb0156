"""An evaluation that was checked and not yet run: all that can be wrong is found without the model's weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import OptionError
from ..methods import Method
from .contenders import Contender, parse_all
from .evaluation import Evaluation
from .run import jobs, rehearse, run
from .settings import Settings, Text, check_folder, check_methods, check_tasks, cut, identity, weights
from .store import Store


@dataclass(frozen=True)
class Plan:
    """What will be measured.

    Attributes:
        tokenizer: of the model.
        text: cut into documents.
        contenders: what is compared.
        settings: how much of it.
        store: where results go, with what is there already.
    """

    tokenizer: Any
    text: Text
    contenders: list[Contender]
    settings: Settings
    store: Store

    def run(self, model: Any, progress: bool = True) -> Evaluation:
        """Measure what is missing.

        Raises:
            OptionError: the results in the folder are of other weights; a method does not fit the model. Nothing was
                measured then.
        """
        self.store.begin(weights(model))
        pending = list(jobs(model, self.tokenizer, self.text, self.contenders, self.settings, self.store))
        if pending:
            rehearse(model, self.contenders, self.text.documents[0][: self.settings.chunk])
        run(pending, self.store, model, progress)
        self.store.catch_up()
        return Evaluation(self.store.records, self.store.identity)


def prepare(
    config: Any,
    tokenizer: Any,
    text: str,
    methods: str | Path | Iterable[str | Method | Contender],
    out: Path | None,
    dtype: str,
    settings: Mapping[str, Any],
) -> Plan:
    """Check everything against a model's configuration; the arguments are those of `evaluate`.

    Raises:
        OptionError: something is not accepted.
    """
    contenders = parse_all(methods)
    chosen = make_settings(settings)
    chosen.check_model(config)
    check_methods(contenders, config)
    if out is not None:
        check_folder(out)
    documents = cut(text, tokenizer, chosen)
    check_tasks(text, tokenizer, chosen)
    about = identity(chosen, config, documents, dtype, contenders)
    return Plan(tokenizer, documents, contenders, chosen, Store(out, about))


def make_settings(settings: Mapping[str, Any]) -> Settings:
    """Return `Settings` with these fields.

    Raises:
        OptionError: there is no such field, or it does not accept the value.
    """
    accepted = list(Settings.__dataclass_fields__)
    for name in settings:
        if name not in accepted:
            raise OptionError(f"{name!r} is unknown; accepted: {', '.join(accepted)}")
    many = {"tasks": str, "task_contexts": int, "depths": float}
    fields: dict[str, Any] = {}
    for name, value in settings.items():
        one = name in many and isinstance(value, many[name])  # "passkey" means ["passkey"]
        fields[name] = (value,) if one else tuple(value) if isinstance(value, list) else value
    return Settings(**fields)
