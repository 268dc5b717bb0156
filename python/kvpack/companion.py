"""What a cache asks of those that keep something beside it: its companions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence


class Companion(ABC):
    """What a companion knows of one cache. It stands in `cache.companions`, and is never changed there, but replaced.

    The method itself, such as `kvpack.LazyLLM`, is entered in `kvpack.methods.COMPANIONS`.
    """

    @abstractmethod
    def check_forward(self) -> None:
        """Raises OptionError when the cache may not take a forward's tokens now."""

    @abstractmethod
    def check_crop(self) -> None:
        """Raises CropError when the cache cannot be cropped."""

    @abstractmethod
    def select(self, rows: Sequence[int]) -> Companion:
        """The same for these rows of the batch, in this order."""

    @abstractmethod
    def fork(self) -> Companion:
        """The same for a copy of the cache, as it was before a forward that is under way."""

    @abstractmethod
    def reset(self) -> Companion | None:
        """What is left when the cache forgets its tokens; None: nothing."""

    @abstractmethod
    def bytes(self) -> Mapping[str, int]:
        """Bytes held, by their label in `cache.memory()`."""

    @abstractmethod
    def positions(self, layer: int, row: int, slots: Sequence[int]) -> list[int]:
        """Logical positions, ascending, of the tokens that a layer's row holds at `slots`."""
