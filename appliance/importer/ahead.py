"""The walk of a tree, so far ahead of its import that the hashing processes have work."""

from collections.abc import Iterator
from typing import Final

from appliance.importer.hasher_pool import HasherPool
from appliance.importer.walk import Event, Step, walk

# Steps of the walk taken ahead of the one in hand, files or not.
_AHEAD_MAX: Final = 4096


class Ahead:
    """Walks the tree `root`, and asks `pool` for its files in the order of the walk."""

    def __init__(self, root: bytes, pool: HasherPool) -> None:
        self._walk = walk(root)
        self._pool = pool
        self._events: list[Event] = []

    def __iter__(self) -> Iterator[Event]:
        """Yield the steps of the walk.

        Raises:
            ImportTreeError: something in the tree cannot be imported.
            HasherEndedError: a hashing process has ended.
        """
        while self.walk_on():
            # The hashing processes have work for the second half while the walk goes on.
            events, self._events = self._events, []
            middle = len(events) // 2
            yield from events[:middle]
            self.walk_on()
            yield from events[middle:]

    def walk_on(self) -> bool:
        """Walk until enough is ahead; return whether anything is.

        Raises:
            ImportTreeError: something in the tree cannot be imported.
            HasherEndedError: a hashing process has ended.
        """
        pool, events = self._pool, self._events
        while len(events) < _AHEAD_MAX and pool.has_room():
            event = next(self._walk, None)
            if event is None:
                break
            if event.step is Step.FILE:
                pool.request(event.detail)
            events.append(event)
        pool.send()
        return bool(events)
