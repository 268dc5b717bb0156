"""What kvpack raises: one class a kind of mistake, each also of the built-in class that fits it."""

from __future__ import annotations

__all__ = [
    "ConcurrencyError",
    "CropError",
    "DeviceError",
    "DtypeError",
    "GradError",
    "InternalError",
    "KvpackError",
    "ModelMismatchError",
    "ModelNeededError",
    "NonFiniteError",
    "OptionError",
    "OutOfMemoryError",
    "ShapeError",
    "StaleHandleError",
    "UnknownPresetError",
]


class KvpackError(Exception):
    """Base of all errors that kvpack raises on purpose."""


class OptionError(KvpackError, ValueError):
    """An option is unknown, contradicts another, or does not fit the model."""


class UnknownPresetError(OptionError, KeyError):
    """There is no preset of that name."""

    __str__ = Exception.__str__  # that of KeyError quotes the message


class ShapeError(KvpackError, ValueError):
    """A tensor's sizes do not fit the cache or its companions."""


class DtypeError(KvpackError, TypeError):
    """A tensor's dtype is not supported, or not the one that the cache holds."""


class ModelNeededError(OptionError):
    """An option is accepted for a cache that is made from a model, not from its configuration alone."""


class DeviceError(KvpackError, ValueError):
    """A model or a tensor is not in CPU memory, or not a plain strided tensor."""


class NonFiniteError(KvpackError, ValueError):
    """Keys or values hold NaN, infinity, or a number beyond what the codec can store."""


class GradError(KvpackError, RuntimeError):
    """Keys or values require grad; a packed cache cannot pass gradients on."""


class CropError(KvpackError, RuntimeError):
    """A crop reaches tokens that are no longer held exactly, or more tokens than there are."""


class ModelMismatchError(KvpackError, ValueError):
    """A cache is used with another model than the one it was made for."""


class StaleHandleError(KvpackError, RuntimeError):
    """Keys or values that `update` returned are used after their cache changed."""


class ConcurrencyError(KvpackError, RuntimeError):
    """Two threads use one cache at the same time."""


class OutOfMemoryError(KvpackError, MemoryError):
    """The system has no memory left for something large that the cache needs."""


class InternalError(KvpackError, RuntimeError):
    """A defect of kvpack itself: please report it."""
