"""The gate between the transactions of a process and a resize of the map that they read."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class TransactionGate:
    """Admits either the transactions of any number of threads, or a single resize."""

    def __init__(self) -> None:
        # Locked directly, not through the condition, which would take longer than beginning a
        # transaction does.
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._num_inside = 0
        self._is_closed = False
        self._of_thread = threading.local()

    def check_outside(self) -> None:
        """Raise a RuntimeError if this thread is inside."""
        if getattr(self._of_thread, "is_inside", False):
            raise RuntimeError("this thread already has an open transaction")

    def enter(self) -> None:
        """Enter with a transaction, once a resize under way has ended.

        Raises:
            RuntimeError: this thread is inside already.
        """
        self.check_outside()
        with self._lock:
            if self._is_closed:
                self._changed.wait_for(lambda: not self._is_closed)
            self._num_inside += 1
        self._of_thread.is_inside = True

    def leave(self) -> None:
        """Leave; called by the thread that entered."""
        self._of_thread.is_inside = False
        with self._lock:
            self._num_inside -= 1
            if self._is_closed:
                self._changed.notify_all()

    @contextmanager
    def closed(self) -> Iterator[None]:
        """Wait until all threads have left, and admit nobody during the block."""
        with self._lock:
            self._changed.wait_for(lambda: not self._is_closed)
            self._is_closed = True
            self._changed.wait_for(lambda: self._num_inside == 0)
        try:
            yield
        finally:
            with self._lock:
                self._is_closed = False
                self._changed.notify_all()
