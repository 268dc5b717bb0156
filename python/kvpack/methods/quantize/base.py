"""What all codecs have in common."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar

from ... import _kvpack
from ..base import Method, Site
from .gptq import GPTQ

if TYPE_CHECKING:
    from ..evict import Evict
    from ..select import Select


class Quantize(Method):
    """A codec: how tokens that have left the exact tail are stored, in fewer bits a number."""

    family: ClassVar[str] = "quantize"

    @abstractmethod
    def keys_method(self, site: Site | None = None) -> _kvpack.Method:
        """How keys are stored in a layer; without a site what is the same in all layers."""

    @abstractmethod
    def values_method(self, site: Site | None = None) -> _kvpack.Method:
        """How values are stored in a layer; without a site what is the same in all layers."""

    @property
    def needs_neighbours(self) -> bool:
        """Whether keys are held in runs of consecutive positions, so that none of them can go."""
        return False

    def centers(self, site: Site | None = None) -> bool:
        """Whether a layer's keys are held less their mean."""
        return False

    def make_layer(
        self, site: Site | None = None, evict: Evict | None = None, select: Select | None = None
    ) -> _kvpack.Layer:
        """How a layer stores its tokens, which of them stay, and which a step of decoding reads."""
        return _kvpack.Layer(
            self.keys_method(site),
            self.values_method(site),
            None if evict is None else evict.make(site),
            None if select is None else select.make(site),
            select is not None,
            self.centers(site),
        )


class Compensated(Quantize):
    """A codec whose keys and values are stored alike, with feedback or without."""

    feedback: GPTQ | None

    @abstractmethod
    def _method(self) -> _kvpack.Method:
        """How both are stored, without feedback."""

    def keys_method(self, site: Site | None = None) -> _kvpack.Method:
        """How keys are stored, with the feedback of their queries."""
        return self._method() if self.feedback is None else self.feedback.for_keys(self._method(), site)

    def values_method(self, site: Site | None = None) -> _kvpack.Method:
        """How values are stored, with the feedback of the layer's output projection."""
        return self._method() if self.feedback is None else self.feedback.for_values(self._method(), site)
