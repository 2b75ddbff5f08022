"""The walk of a tree, so far ahead of its import that the hashing processes have work."""

from collections.abc import Iterator, Mapping
from typing import Final

from appliance.importer.hasher_pool import HasherPool
from appliance.importer.root import Identity, OpenRoot
from appliance.importer.walk import NOTHING, Event, Step, walk

# Steps of the walk taken ahead of the one in hand, files or not.
_AHEAD_MAX: Final = 4096


class Ahead:
    """Walks the tree `root`, and asks `pool` for its files in the order of the walk.

    Args:
        root: open until the end of the walk.
        pool: idle.
        excluded: see `walk`.
    """

    def __init__(
        self, root: OpenRoot, pool: HasherPool, excluded: Mapping[Identity, str] = NOTHING
    ) -> None:
        self.root = root
        self._walk = walk(root, excluded)
        self._pool = pool
        self._events: list[Event] = []
        pool.begin_root(root)

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
            step, name, detail = event
            if step is Step.FILE:
                pool.request(detail, name or self.root.entry)
            events.append(event)
        pool.send()
        return bool(events)
