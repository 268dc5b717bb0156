"""What a run measures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

Shape = tuple[int, int, int]

# Query heads, KV heads, head_dim: SmolLM2, Llama 3, a model without grouped queries, Gemma.
SHAPES: tuple[Shape, ...] = ((9, 3, 64), (32, 8, 128), (16, 16, 128), (4, 1, 256))
# SmolLM2 takes 8192 positions; the decoded tokens must fit behind the longest context.
LONGEST_CONTEXT = 8192 - 128


@dataclass(frozen=True)
class Options:
    """The sizes of one run.

    Attributes:
        quick: small sizes, to see that everything works; the numbers say nothing.
        threads: the numbers of threads to measure with.
        peers_python: the interpreter of the environment that the peers are installed in.
    """

    quick: bool = False
    threads: tuple[int, ...] = (1, 2)
    peers_python: Path = Path(".venv-peers/bin/python")

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """Head shapes of the attention part."""
        return SHAPES[:2] if self.quick else SHAPES

    @property
    def contexts(self) -> tuple[int, ...]:
        """Tokens cached, in the attention part."""
        return (512, 1024) if self.quick else (2048, 8192, 32_768, 131_072)

    @property
    def small_contexts(self) -> tuple[int, ...]:
        """Tokens cached where only one thread is compared with several."""
        return (128,) if self.quick else (128, 256, 512, 1024)

    @property
    def cell_seconds(self) -> float:
        """How long a cell of the attention part is sampled, at least five rounds though."""
        return 0.1 if self.quick else 2.0

    @property
    def past(self) -> int:
        """Tokens cached before the new ones, in the part with many queries."""
        return 512 if self.quick else 8192

    @property
    def new(self) -> int:
        """New tokens, in the part with many queries."""
        return 64

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Dtypes of the whole model."""
        return ("float32",) if self.quick else ("float32", "bfloat16")

    @property
    def model_contexts(self) -> tuple[int, ...]:
        """Tokens cached in the whole model, ascending."""
        return (128, 256) if self.quick else (512, 2048, 4096, LONGEST_CONTEXT)

    @property
    def rounds(self) -> int:
        """Turns that every engine of the whole model gets in a context."""
        return 2 if self.quick else 4

    @property
    def turn_steps(self) -> int:
        """Decode steps of a turn; fewer where they take long."""
        return 2 if self.quick else 8

    @property
    def prefill_tokens(self) -> int:
        """Length of the prompt whose prefill is timed."""
        return 256 if self.quick else 4096

    @property
    def prefill_rounds(self) -> int:
        """How often that prefill is timed."""
        return 1 if self.quick else 3

    @property
    def stall_steps(self) -> int:
        """Decode steps among which the longest is looked for."""
        return 20 if self.quick else 2000

    @property
    def stall_context(self) -> int:
        """Tokens cached when that search starts."""
        return 128 if self.quick else 512
