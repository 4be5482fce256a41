"""A lock that serialises the steps of an optimizer."""

from __future__ import annotations

import functools
import os
import weakref
from _thread import RLock
from collections.abc import Callable
from typing import Any, TypeVar, cast

_Method = TypeVar("_Method", bound=Callable[..., Any])


class StepLock(RLock):  # type: ignore[misc]  # RLock is final in typeshed only
    """A reentrant lock. A copy or an unpickled lock is a new lock, and is free.

    Reentrance prevents a deadlock in a signal handler that saves a checkpoint during a step. A fork while another
    thread holds the lock leaves the lock free in the child process.
    """

    def __init__(self) -> None:
        super().__init__()
        _locks.add(self)

    def __reduce__(self) -> tuple[type[StepLock], tuple[()]]:
        return StepLock, ()


def one_at_a_time(method: _Method) -> _Method:
    """Makes a method run while it holds the `_lock` of its object."""

    @functools.wraps(method)
    def alone(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self._lock:
            return method(self, *args, **kwargs)

    return cast(_Method, alone)


_locks: weakref.WeakSet[Any] = weakref.WeakSet()


def _free_all() -> None:
    for lock in _locks:
        # The forking thread continues in the child and releases its own locks there.
        if not lock._is_owned():
            lock._at_fork_reinit()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_free_all)
