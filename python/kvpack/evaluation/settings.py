"""What an evaluation is: checked before anything slow begins, and written beside its results."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from .. import _kvpack
from ..errors import ModelNeededError, OptionError
from . import costs
from .contenders import Contender
from .tasks import NOISE, TASKS, build, start_tokens

ASK = ("after", "with")


@dataclass(frozen=True)
class Settings:
    """The size of an evaluation.

    Attributes:
        context: tokens of a document: each is read from its beginning with an empty cache.
        tokens: tokens of the text to read; as many whole documents as fit.
        chunk: tokens that are fed at once: every token is predicted from a past that the cache holds already, but for
            those of its own chunk.
        greedy: tokens that each method generates from each of `greedy_prompts` documents; 0 leaves it out.
        greedy_prompts: documents that are continued.
        tasks: names among `TASKS`.
        task_contexts: tokens of a task's text; empty for a quarter, half and all of `context`.
        depths: where in the text what is asked for lies, as shares.
        samples: texts of each task, context and depth.
        filler: what the tasks are hidden in: `"noise"`, the same five sentences over and over; `"text"`, the text
            that is read; or any text of yours. Small models find less in real prose.
        ask: when the question of a task is read: `"after"` the text, which is packed by then, or `"with"` it, at the
            end of the prompt, as methods want it that choose tokens by the prompt's last queries.
        costs: whether time and memory are measured.
        seed: of the tasks.
    """

    context: int = 2048
    tokens: int = 16_384
    chunk: int = 128
    greedy: int = 64
    greedy_prompts: int = 4
    tasks: tuple[str, ...] = ()
    task_contexts: tuple[int, ...] = ()
    depths: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)
    samples: int = 2
    filler: str = "noise"
    ask: str = "after"
    costs: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"context": 16, "tokens": 16, "chunk": 1, "greedy": 0, "greedy_prompts": 0, "samples": 1}
        for name, low in least.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                raise OptionError(f"{name}={value!r} is not accepted; accepted: whole numbers from {low}")
        if self.tokens < self.context:
            raise OptionError(f"tokens={self.tokens} is not accepted; accepted: at least the context, {self.context}")
        for name in ("tasks", "task_contexts", "depths"):
            if not isinstance(getattr(self, name), tuple):
                raise OptionError(f"{name}={getattr(self, name)!r} is not accepted; accepted: a list")
        if self.ask not in ASK:
            raise OptionError(f"ask={self.ask!r} is not accepted; accepted: {', '.join(ASK)}")
        for task in self.tasks:
            if task not in TASKS:
                raise OptionError(f"tasks: {task!r} is unknown; accepted: {', '.join(TASKS)}")
        for depth in self.depths:
            if not isinstance(depth, int | float) or not 0 <= depth <= 1:
                raise OptionError(f"depths: {depth!r} is not accepted; accepted: shares from 0 to 1")
        for tokens in self.task_contexts:
            if not isinstance(tokens, int) or tokens < 128:
                raise OptionError(f"task_contexts: {tokens!r} is not accepted; accepted: whole numbers from 128")

    @property
    def contexts_of_tasks(self) -> tuple[int, ...]:
        """Tokens of the tasks' texts."""
        return self.task_contexts or tuple(n for n in (self.context // 4, self.context // 2, self.context) if n >= 128)

    def filler_of(self, text: str) -> str:
        """Return the text that tasks are hidden in, when `text` is what is read."""
        return {"noise": NOISE, "text": text}.get(self.filler, self.filler)

    def check_model(self, config: Any) -> None:
        """Raise OptionError when the texts are longer than a model with that configuration reads."""
        decoded = max(self.greedy, costs.STEPS + costs.TURN if self.costs else 0)
        longest = max(self.context + decoded, *(self.contexts_of_tasks if self.tasks else (0,)))
        text_config = config.get_text_config(decoder=True)
        limit = getattr(text_config, "max_position_embeddings", None) or getattr(text_config, "max_seq_len", None)
        if limit is not None and longest > limit:
            raise OptionError(
                f"context: {longest} tokens are needed at once (those of a document and those decoded after it); "
                f"accepted: up to the model's {limit}"
            )


@dataclass(frozen=True)
class Text:
    """A text as documents of equal length.

    Attributes:
        documents: `[n, context]` token ids.
        words: the text itself, which fills the tasks.
        sha256: of the text.
    """

    documents: Tensor
    words: str
    sha256: str = field(repr=False)


def cut(text: str, tokenizer: Any, settings: Settings) -> Text:
    """Cut the first `settings.tokens` tokens of `text` into documents.

    Raises:
        OptionError: the text is too short.
    """
    if not isinstance(text, str):
        raise OptionError(f"text: given a {type(text).__name__}, expected a string")
    if not callable(tokenizer):
        raise OptionError(f"tokenizer: given a {type(tokenizer).__name__}, expected a tokenizer of transformers")
    start = start_tokens(tokenizer)
    count, length = settings.tokens // settings.context, settings.context - len(start)
    # A token is rarely longer than eight characters: a whole library need not be read.
    ids = tokenizer(text[: 8 * settings.tokens], add_special_tokens=False, verbose=False)["input_ids"]
    if len(ids) < count * length and len(text) > 8 * settings.tokens:
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if len(ids) < count * length:
        raise OptionError(f"text: given one of {len(ids)} tokens, expected at least tokens={settings.tokens}")
    documents = torch.tensor([start + ids[i * length : (i + 1) * length] for i in range(count)])
    return Text(documents, text, hashlib.sha256(documents.numpy().tobytes() + text.encode()).hexdigest())


def check_tasks(text: str, tokenizer: Any, settings: Settings) -> None:
    """Raise OptionError when a task does not fit into one of its lengths."""
    if settings.tasks and not settings.contexts_of_tasks:
        raise OptionError(f"context={settings.context} is not accepted with tasks; accepted: at least 128")
    for task in settings.tasks:
        for context in settings.contexts_of_tasks:
            build(task, tokenizer, settings.filler_of(text), context, 0.5, "check")


def identity(
    settings: Settings, config: Any, text: Text, dtype: str, contenders: Sequence[Contender]
) -> dict[str, Any]:
    """Return what must be equal for results to belong together: resuming anything else would mix them up.

    The model's `weights` belong to it too, as soon as it is loaded.
    """
    files = {contender.label: contender.files for contender in contenders if contender.files}
    volatile = ("transformers_version", "dtype", "torch_dtype", "_name_or_path", "architectures")
    described = {name: value for name, value in config.to_dict().items() if name not in volatile}
    described_bytes = json.dumps(described, sort_keys=True, default=str).encode()
    return {
        "model": Path(getattr(config, "_name_or_path", "") or type(config).__name__).name,
        "config": hashlib.sha256(described_bytes).hexdigest()[:16],
        "dtype": dtype,
        "text": text.sha256[:16],
        "context": settings.context,
        "tokens": settings.tokens,
        "chunk": settings.chunk,
        "greedy": settings.greedy,
        "seed": settings.seed,
        "filler": hashlib.sha256(settings.filler.encode()).hexdigest()[:16],
        **({"ask": settings.ask} if settings.ask != "after" else {}),  # older results do not say it
        "kvpack": _kvpack.__version__,
        "isa": _kvpack.isa(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        **({"files": files} if files else {}),
    }


SAMPLE = 4096
"""Numbers of a tensor that are looked at one by one."""


def weights(model: Any) -> str:
    """Return a hash of a model's weights: a training step, or another checkpoint, gives another one.

    It is of each tensor's name, dtype and shape, of `SAMPLE` of its numbers, evenly spread, and of the sum of the bits
    of those around each. Tensors that are not in memory (offloaded ones) count by name, dtype and shape alone.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted({**dict(model.named_parameters()), **dict(model.named_buffers())}.items()):
        digest.update(name.encode())
        _add_tensor(digest, tensor.detach())
    return digest.hexdigest()[:16]


def _add_tensor(digest: Any, tensor: Tensor) -> None:
    digest.update(f" {tensor.dtype} {tuple(tensor.shape)}".encode())
    if hasattr(type(tensor), "__tensor_flatten__"):  # one that is made of others, as quantised ones are
        for part in tensor.__tensor_flatten__()[0]:
            _add_tensor(digest, getattr(tensor, part))
        return
    if tensor.device.type != "cpu" or not tensor.numel():
        return
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = tensor.reshape(-1).view(whole.get(tensor.element_size(), torch.uint8))
    step = -(-len(bits) // SAMPLE)
    steps = len(bits) // step * step
    digest.update(bits[::step].contiguous().numpy().tobytes())
    for part in (bits[:steps].view(-1, step), bits[steps:].view(1, -1)):
        digest.update(part.sum(1, dtype=torch.int64).numpy().tobytes())


def check_methods(contenders: list[Contender], config: Any) -> None:
    """Raise OptionError when a method does not fit a model with that configuration."""
    for contender in contenders:
        try:
            contender.new_cache(config)
        except ModelNeededError:
            continue  # it is there when the evaluation runs
        except (ImportError, ValueError) as error:  # OptionError is one, and transformers' caches raise others
            raise OptionError(f"method {contender.label!r}: {error}") from None


def check_folder(folder: Path) -> None:
    """Make the folder of the results; raise OptionError when it cannot be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".kvpack-probe"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise OptionError(f"out: {folder} cannot be written to: {error}") from None
