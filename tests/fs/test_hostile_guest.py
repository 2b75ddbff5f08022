"""Any request gets a reply the kernel accepts, and no request makes the handler fail."""

import asyncio
import errno
import multiprocessing
import os
import random
from multiprocessing import reduction
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from appliance.fs.handler import Handler
from appliance.fuse_proto.dispatch import COUNTERS, Dispatcher
from appliance.fuse_proto.operations import NotReady
from appliance.resolve.local import LocalResolver
from appliance.resolve.resolver import SessionGrants
from appliance.session.grant_table import GrantTable
from appliance.session.grants import Grants
from appliance.store.store import Store
from tests.fakes import fuse_client
from tests.fakes.fuse_client import PlainSession
from tests.fs.guest import File, Guest, Link, Tree, basename, put

DEADLINE_S = 30
TREE: Tree = {
    b"file": File(b"content"),
    b"big": File(bytes(100_000)),
    b"link": Link(b"target"),
    b"sub": {b"%d" % i: {b"x": File(b"%d" % i)} for i in range(20)},
}
EXPECTED = frozenset(
    {
        0,
        errno.ENOENT,
        errno.ESTALE,
        errno.ENOTDIR,
        errno.EISDIR,
        errno.EINVAL,
        errno.ENODATA,
        errno.ERANGE,
        errno.ENOSYS,
        errno.ENAMETOOLONG,
    }
)


def number(rng: random.Random, bits: int) -> int:
    return rng.choice(
        [rng.randrange(8), rng.randrange(40), rng.getrandbits(12), rng.getrandbits(bits)]
    )


def random_request(rng: random.Random) -> bytes:
    nodeid = number(rng, 64)
    name = rng.choice([b"file", b"sub", b"7", b"x", b".", b"..", b"a/b", b"n" * 300, basename("t")])
    offset = number(rng, 64)
    size = number(rng, 32)
    return rng.choice(
        [
            fuse_client.lookup(nodeid, name),
            fuse_client.getattr_(nodeid),
            fuse_client.readlink(nodeid),
            fuse_client.read(nodeid, offset, size),
            fuse_client.readdir(nodeid, offset, size),
            fuse_client.readdirplus(nodeid, offset, size),
            fuse_client.getxattr(nodeid, b"user.tvix.castore.blob.digest", size),
            fuse_client.listxattr(nodeid, size),
            fuse_client.statfs(nodeid),
            fuse_client.open_(nodeid),
            fuse_client.lseek(nodeid, offset, 3),
        ]
    )


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_random_requests_get_replies_and_no_bug_shows(
    guest: Guest, seed: int, caplog: pytest.LogCaptureFixture
) -> None:
    guest.lookup(guest.walk(put(guest.store, "t", TREE)), b"sub")
    rng = random.Random(seed)
    errors = set()
    for _ in range(1000):
        room = rng.choice([16 + 4096, 16 + (1 << 20)])
        errors.add(guest.ask(random_request(rng), room).error)
    assert errors <= EXPECTED
    assert {0, errno.ESTALE, errno.ENOTDIR} <= errors
    assert caplog.records == []


def _resolve_for(path: Path, channel: Connection) -> None:
    store = Store.open(path / "store", create=True, map_size_bytes=1 << 24)
    put(store, "t", TREE)
    table = GrantTable()
    with asyncio.Runner() as runner:
        resolver, grants = LocalResolver(store), SessionGrants(table)
        reduction.send_handle(channel, table.fd, os.getppid())
        while (want := channel.recv()) is not None:
            channel.send(runner.run(resolver.resolve(want, grants)))


def test_a_reader_sees_what_the_supervisor_in_another_process_grants(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()  # of sockets, so descriptors pass
    process = context.Process(target=_resolve_for, args=(tmp_path, theirs))
    process.start()
    assert ours.poll(DEADLINE_S)
    grants_fd = reduction.recv_handle(ours)
    store = Store.open(tmp_path / "store", is_readonly=True)
    handler = Handler(Grants(grants_fd), store, is_root_listable=False)
    counters = memoryview(bytearray(8 * COUNTERS)).cast("Q")
    dispatcher = Dispatcher(handler, PlainSession(), counters)

    def ask(request: bytes) -> bytes:
        while True:
            try:
                with handler.batch():
                    reply = dispatcher.handle_untrusted(memoryview(request), len(request), 8192)
                    assert reply is not None
                    return fuse_client.parse_reply(fuse_client.wire(reply)).body
            except NotReady as exc:
                ours.send(exc.want)
            assert ours.poll(DEADLINE_S)
            assert ours.recv() == 0

    ask(fuse_client.init())
    nodeid = fuse_client.ROOT
    for name in (basename("t"), b"sub", b"7", b"x"):
        nodeid = fuse_client.parse_entry(ask(fuse_client.lookup(nodeid, name))).nodeid
    assert ask(fuse_client.read(nodeid, 0, 100)) == b"7"
    ours.send(None)
    process.join(DEADLINE_S)
    assert process.exitcode == 0
    handler.close()
    os.close(grants_fd)
    store.close()
