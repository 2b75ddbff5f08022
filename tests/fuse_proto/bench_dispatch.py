"""Measures `Dispatcher.handle_untrusted`, in nanoseconds, with operations that do nothing.

Run from the tree's root: `.venv/bin/python -m tests.fuse_proto.bench_dispatch`.
"""

import timeit

from appliance.fuse_proto._fuse_wire import ATTR_OUT_SIZE, ENTRY_OUT_SIZE
from appliance.fuse_proto.dispatch import COUNTERS, Dispatcher
from appliance.fuse_proto.operations import Body, Operations, Request
from tests.fakes import fuse_client

NUM = 20_000
ROUNDS = 9
WRITABLE = 16 + 4096


class Instant(Operations):
    def __init__(self) -> None:
        self._entry = bytes(ENTRY_OUT_SIZE)
        self._attr = bytes(ATTR_OUT_SIZE)
        self._page = bytes(4096)

    def lookup(self, request: Request) -> Body:
        del request
        return self._entry

    def getattr(self, request: Request) -> Body:
        del request
        return self._attr

    def read(self, request: Request) -> Body:
        del request
        return self._page

    def readdirplus(self, request: Request) -> Body:
        del request
        return self._page


def main() -> None:
    session = fuse_client.PlainSession()
    session.start(38, 0, 0)
    dispatcher = Dispatcher(Instant(), session, memoryview(bytearray(8 * COUNTERS)).cast("Q"))
    requests = {
        "LOOKUP": fuse_client.lookup(1, b"libc.so.6"),
        "GETATTR": fuse_client.getattr_(1),
        "READ": fuse_client.read(1, 0, 4096),
        "READDIRPLUS": fuse_client.readdirplus(1, 0, 4096),
    }
    for name, data in requests.items():
        view, size = memoryview(data), len(data)

        def run(view: memoryview = view, size: int = size) -> None:
            dispatcher.handle_untrusted(view, size, WRITABLE)

        best = min(timeit.repeat(run, number=NUM, repeat=ROUNDS))
        print(f"{name:12} {best / NUM * 1e9:6.0f} ns")


if __name__ == "__main__":
    main()
