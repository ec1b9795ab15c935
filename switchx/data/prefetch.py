"""A background thread that makes batches, and puts them on devices, ahead of the consumer."""

import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

from switchx.batch import Batch


@runtime_checkable
class Seekable(Protocol):
    """An iterator of batches with a position that it can return to."""

    def __next__(self) -> Batch:
        """The next batch."""
        ...

    def position(self) -> dict[str, Any]:
        """Where the next batch is: integers and strings that go into JSON."""
        ...

    def seek(self, position: Mapping[str, Any]) -> None:
        """Go to a position."""
        ...


class Prefetcher(Iterator[Any]):
    """Runs `batches` and `place` up to `size` batches ahead in a thread.

    The thread starts with the first batch asked for, or with `start`. `position` is that of the
    consumer: batches made but not handed out do not count. Whatever the thread raises is raised
    from `next` in its turn.
    """

    def __init__(self, batches: Seekable, place: Callable[[Batch], Any], size: int = 2) -> None:
        """`place` maps a host batch to what the consumer gets, e.g. a device_put."""
        if size < 1:
            raise ValueError(f"size = {size} must be at least 1")
        self._batches = batches
        self._place = place
        self._size = size
        self._queue: queue.Queue[tuple[Any, dict[str, Any], BaseException | None]] = queue.Queue()
        # Counts free places, so that close() can end a producer that waits for one.
        self._free = threading.Semaphore(size)
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._position = dict(batches.position())

    def start(self) -> None:
        """Begin making batches; the first `next` does so too."""
        if self._closed.is_set():
            raise RuntimeError("the prefetcher is closed")
        if self._thread is None:
            self._thread = threading.Thread(target=self._produce, daemon=True, name="prefetch")
            self._thread.start()

    def __next__(self) -> Any:
        """The next placed batch."""
        if self._failure is not None:
            raise self._failure
        self.start()  # refuses once closed
        placed, position, failure = self._queue.get()
        if failure is not None:
            self._failure = failure
            raise failure
        self._free.release()
        self._position = position
        return placed

    def position(self) -> dict[str, Any]:
        """Position after the last batch handed out, whatever has been made ahead of it."""
        return dict(self._position)

    def seek(self, position: Mapping[str, Any]) -> None:
        """Go to a position; only before the thread has started."""
        if self._thread is not None:
            raise RuntimeError("seek before the first batch, not after")
        self._batches.seek(position)
        self._position = dict(self._batches.position())

    def close(self) -> None:
        """End the thread after the batch it is at. Safe to call twice."""
        self._closed.set()
        self._free.release()
        # A failure goes to a consumer that is waiting; without one it is simply never read.
        self._queue.put((None, self._position, RuntimeError("the prefetcher is closed")))
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout=60.0)

    def _produce(self) -> None:
        while True:
            self._free.acquire()
            if self._closed.is_set():
                return
            try:
                item = (self._place(next(self._batches)), self._batches.position(), None)
            except BaseException as error:
                self._queue.put((None, {}, error))
                return
            self._queue.put(item)
