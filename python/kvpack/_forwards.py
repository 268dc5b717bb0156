"""Whether a thread's forward is still under way, or was left by an exception."""

from __future__ import annotations

import logging
import sys
import threading
from types import FrameType
from typing import NamedTuple

_MODULES = "nn/modules/module.py"


class Begun(NamedTuple):
    """Where a forward began.

    Attributes:
        thread: the identity of its thread.
        in_module: whether it is a torch module's, and not a loop of somebody's own.
    """

    thread: int
    in_module: bool


def begun() -> Begun:
    """The forward that the calling thread begins."""
    return Begun(threading.get_ident(), _in_module(sys._getframe(1)))


def is_under_way(forward: Begun | None, cache: object) -> bool:
    """Whether a thread is still within a forward with this cache.

    A module's is over when the thread runs no module's code any more that knows the cache; one of somebody's own loop
    only with its thread.
    """
    if forward is None:
        return True
    if forward.thread == threading.get_ident():
        return False  # it is another thread's: that one is gone, and the calling thread has its identity
    frame = sys._current_frames().get(forward.thread)
    if frame is None or not forward.in_module:
        return frame is not None
    while frame is not None:
        if any(x is cache for x in frame.f_locals.values()) and _in_module(frame.f_back):
            return True
        frame = frame.f_back
    return False


def rolled_back(came_to: int, last: int) -> None:
    """Says that a forward was begun and never ended, so that the cache is what it was before it."""
    logging.getLogger("kvpack").warning(
        "a forward that came to layer %d and never to the attention of the last one, %d, was rolled back: it was "
        "interrupted, or the model has fewer layers than this cache was made for",
        came_to,
        last,
    )


def _in_module(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.replace("\\", "/").endswith(_MODULES):
            return True
        frame = frame.f_back
    return False
