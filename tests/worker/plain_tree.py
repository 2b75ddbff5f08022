"""A tree, and requests for it of which most are plain."""

import os

from tests.fakes import fuse_client
from tests.fakes.fuse_client import ROOT
from tests.fs.guest import File, Link, Model, basename
from tests.worker.twins import Twins

BIG = os.urandom(300_000)
NUM_BIG = 100
TREE: dict[bytes, Model] = {
    b"big": File(BIG),
    b"file": File(b"content"),
    b"link": Link(b"target"),
    b"many": {b"%03d" % i: File(b"%d" % i * 70_000) for i in range(NUM_BIG)},
}
REPLY_BYTES = 16 + (1 << 20)
# Which of `requests_of` are answered in C.
PLAIN = [True, False, True, True, True, False, True, True, False, True]


def top_of(twins: Twins) -> int:
    return twins.lookup(ROOT, basename("tree")).nodeid


def requests_of(twins: Twins) -> list[bytes]:
    top = top_of(twins)
    big, link = twins.lookup(top, b"big").nodeid, twins.lookup(top, b"link").nodeid
    return [
        fuse_client.lookup(top, b"file"),
        fuse_client.getattr_(ROOT),
        fuse_client.read(big, 1000, 200_000),
        fuse_client.forget(big),
        fuse_client.readlink(link),
        fuse_client.statfs(),
        fuse_client.readdirplus(top, 0),
        fuse_client.lookup(top, b"no such"),
        fuse_client.readlink(big),
        fuse_client.read(big, len(BIG) - 10, 4096),
    ]
