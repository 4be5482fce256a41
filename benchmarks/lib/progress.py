"""Progress bars on stderr, if tqdm is installed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class _Silent(Generic[T]):
    """A replacement for tqdm's bar that shows nothing."""

    def __init__(self, items: Iterable[T]) -> None:
        self._items = items

    def __iter__(self) -> Iterator[T]:
        return iter(self._items)

    def update(self, count: int = 1) -> None:
        pass

    def set_description(self, text: str) -> None:
        pass

    def close(self) -> None:
        pass


def bar(
    items: Iterable[T] | None = None,
    *,
    desc: str,
    total: int | None = None,
    unit: str = "it",
) -> Any:
    """Returns a progress bar over the items, or a bar that `update` moves if only `total` is given.

    Args:
        items: The items to iterate over.
        desc: The words before the bar.
        total: The number of items, if `items` has no length.
        unit: The noun for one item.
    """
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        return _Silent(items or ())
    return tqdm(items, desc=desc, total=total, unit=unit, leave=False)
