"""A lock for an object that takes one step at a time."""

from __future__ import annotations

import functools
import os
import weakref
from _thread import RLock
from collections.abc import Callable
from typing import Any, TypeVar, cast

_Method = TypeVar("_Method", bound=Callable[..., Any])


class StepLock(RLock):  # type: ignore[misc]  # it is final to the type checker alone
    """A lock that the thread that holds it may take again, and of which a copy is a new one.

    So a signal handler that saves a checkpoint in the middle of a step does not wait for ever. A process that is forked
    while another thread holds the lock starts with a free one.
    """

    def __init__(self) -> None:
        super().__init__()
        _locks.add(self)

    def __reduce__(self) -> tuple[type[StepLock], tuple[()]]:
        return StepLock, ()


def one_at_a_time(method: _Method) -> _Method:
    """Makes a method wait for whatever else holds its object's `_lock`."""

    @functools.wraps(method)
    def alone(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self._lock:
            return method(self, *args, **kwargs)

    return cast(_Method, alone)


_locks: weakref.WeakSet[Any] = weakref.WeakSet()


def _free_all() -> None:
    for lock in _locks:
        # The thread that forks goes on in the child, and gives back what it holds.
        if not lock._is_owned():
            lock._at_fork_reinit()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_free_all)
