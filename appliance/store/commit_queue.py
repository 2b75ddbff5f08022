"""Commits of concurrent tasks, gathered: what arrives during one commit makes up the next."""

import threading
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Final, NamedTuple

from appliance.errors import ApplianceError
from appliance.store.batch import Batch
from appliance.store.store import Store

# So that one commit neither takes long nor holds many dirty pages.
_COMMIT_BYTES: Final = 16 << 20


class _Waiting(NamedTuple):
    batch: Batch
    future: Future[None]

    def end(self, refused: Mapping[bytes, ApplianceError]) -> None:
        """Tell who waits that it was committed, or what of it was refused."""
        error = next((refused[path] for path in self.batch.path_infos if path in refused), None)
        if error is None:
            self.future.set_result(None)
        else:
            self.future.set_exception(error)


class CommitQueue:
    """A thread that commits to `store`; it is the writer of this process."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._changed = threading.Condition()
        self._waiting: list[_Waiting] = []
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, name="commit")
        self._thread.start()

    def submit(self, batch: Batch) -> Future[None]:
        """Commit `batch`, with others perhaps; the future fails as `Store.commit` does."""
        future: Future[None] = Future()
        future.set_running_or_notify_cancel()  # the batch is taken over: too late to cancel
        with self._changed:
            if self._is_closing:
                raise RuntimeError("the store is being closed")
            self._waiting.append(_Waiting(batch, future))
            self._changed.notify()
        return future

    def close(self) -> None:
        """Commit what waits, and end the thread."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while group := self._next_group():
            merged = Batch()
            for item in group:
                merged.merge(item.batch)
            try:
                refused = self._store.commit_accepted(merged)
            except BaseException as exc:  # noqa: BLE001 - whatever it was, those who wait must know
                for item in group:
                    item.future.set_exception(exc)
            else:
                for item in group:
                    item.end(refused)

    def _next_group(self) -> list[_Waiting]:
        # Empty when closing and all is done.
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._is_closing)
            size_bytes = 0
            num_items = 0
            paths: set[bytes] = set()
            for item in self._waiting:
                if num_items and size_bytes + item.batch.size_bytes > _COMMIT_BYTES:
                    break
                # Of two PathInfos of one path, the second is put when the first is there.
                if not paths.isdisjoint(item.batch.path_infos):
                    break
                paths.update(item.batch.path_infos)
                size_bytes += item.batch.size_bytes
                num_items += 1
            group = self._waiting[:num_items]
            del self._waiting[:num_items]
            return group
