"""Reading and writing beside the model: the next rows are read and tokenised, the last ones hashed and written, in threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")
R = TypeVar("R")


def ahead(items: Iterable[T], make: Callable[[T], R]) -> Generator[tuple[T, R]]:
    """`(item, make(item))` in order. While the caller is busy with one, the next is made; never more than one.

    An error of `make` is raised where its item would have come.
    """
    with ThreadPoolExecutor(1, "ahead") as thread:
        coming = deque[tuple[T, Future[R]]]()
        for item in items:
            coming.append((item, thread.submit(make, item)))
            if len(coming) == 2:
                before, made = coming.popleft()
                yield before, made.result()
        for before, made in coming:
            yield before, made.result()


@contextmanager
def behind() -> Generator[Callable[..., None]]:
    """Yield `do(work, *given)`, which runs `work(*given)` in a thread while the caller goes on.

    One piece at a time: `do` waits for the piece before, so a kill loses no more than one, and raises its error. The block
    ends when the last piece is done.
    """
    last = Future[Any]()
    last.set_result(None)
    with ThreadPoolExecutor(1, "behind") as thread:

        def do(work: Callable[..., Any], *given: Any) -> None:
            nonlocal last
            last.result()
            last = thread.submit(work, *given)

        yield do
        last.result()
