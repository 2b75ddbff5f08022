"""Requests that wait for the resolver, and what they wait for."""

from collections.abc import Callable
from typing import Generic, TypeVar, cast

from appliance.fuse_proto.operations import NotReady
from appliance.index.wants import Want

T = TypeVar("T")


class Parking(Generic[T]):
    """Requests set aside by want; `T` is all that it takes to run one again from the start."""

    def __init__(self, ask: Callable[[Want], None]) -> None:
        self._ask = ask
        self._parked: dict[Want, list[T]] = {}

    def __bool__(self) -> bool:
        return bool(self._parked)

    def park(self, reason: NotReady, request: T) -> None:
        """Keep `request` until `take`; the first to want something has it asked for."""
        want = cast("Want", reason.want)  # the handler raises no other
        requests = self._parked.get(want)
        if requests is None:
            self._parked[want] = [request]
            self._ask(want)
        else:
            requests.append(request)

    def take(self, want: Want) -> list[T]:
        """Return the requests that wait for `want`, which wait no longer."""
        return self._parked.pop(want, [])

    def wants(self) -> list[Want]:
        """Return everything that is waited for."""
        return list(self._parked)
