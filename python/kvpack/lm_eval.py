"""The model `kvpack` of EleutherAI's lm-evaluation-harness: a Hugging Face model that reads through a packed cache.

    python -m kvpack.lm_eval --model kvpack --model_args pretrained=NAME,method=kivi:bits=4 --tasks lambada_openai

The harness has no entry points for models of other packages: this command makes its model known and is the harness's
own command otherwise. In Python, importing this module is enough: `lm_eval.simple_evaluate(model="kvpack", ...)`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .attach import attach
from .attention import NAME
from .cache import PackedCache
from .errors import OptionError
from .forward import CACHE_ARGUMENT
from .methods.spec import parse_spec

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ImportError as error:
    raise ImportError("kvpack.lm_eval needs the harness: pip install 'kvpack[lm-eval]'") from error


@register_model("kvpack")
class KvpackLM(HFLM):
    """The harness's `hf` model on the CPU, with a packed cache."""

    def __init__(self, pretrained: Any, method: str = "exact", chunk: int | str = 128, **arguments: Any) -> None:
        """Load a model; the arguments are those of `hf`, and two more.

        Args:
            pretrained: a model, its folder or its name.
            method: what the cache does, such as `kivi:bits=4`.
            chunk: tokens that are fed at once when likelihoods are measured: a token is predicted from a past that is
                packed, but for the tokens of its own chunk.
            **arguments: as for `hf`.

        Raises:
            OptionError: `method` or `chunk` is not accepted.
        """
        self._spec = parse_spec(method)
        try:
            self._chunk = int(chunk)
        except ValueError:
            self._chunk = 0
        if self._chunk < 1:
            raise OptionError(f"chunk={chunk!r} is not accepted; accepted: whole numbers from 1")
        super().__init__(pretrained, backend="causal", **({"device": "cpu"} | arguments))
        self.model.set_attn_implementation(NAME)
        PackedCache(self.model, **self._spec.options)  # a method that does not fit the model is an error here

    def _model_call(self, inps: Tensor, attn_mask: Any = None, labels: Any = None) -> Tensor:
        """Logits of `inps` `[batch, tokens]`, padded at the end, read a chunk at a time."""
        cache = PackedCache(self.model, **self._spec.options)
        with torch.inference_mode():
            parts = [
                self.model(input_ids=part, **{CACHE_ARGUMENT: cache, "use_cache": True}).logits
                for part in inps.split(self._chunk, dim=1)
            ]
        return torch.cat(parts, dim=1)

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **options: Any) -> Tensor:
        """As `hf`, with a fresh packed cache."""
        with attach(self.model, **self._spec.options):
            generated: Tensor = super()._model_generate(context, max_length, stop, **options)
        return generated


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
