"""The start of a worker: its first message says what it serves, and with which store and session.

A worker holds nothing that its guest could miss. What it is told (memory table, ring, INIT's
outcome), the supervisor keeps and tells a successor again; what it has popped is in the inflight
record. So it can be killed at any instruction.

Everything that it needs is open before it reads what a guest wrote; it then locks itself down
(`sandbox`).
"""

import logging
import socket
from functools import partial
from pathlib import Path

from appliance.fs.files import RemoteParts
from appliance.fs.handler import Handler
from appliance.fs.passthrough import PassthroughHandler
from appliance.fuse_proto._fuse_wire import InitFlag
from appliance.fuse_proto.dispatch import Dispatcher
from appliance.fuse_proto.init import DEVICE_FLAGS, PASSTHROUGH_FLAGS, WANTED_FLAGS
from appliance.log import configure_logging
from appliance.protos import control_pb2 as pb
from appliance.session import channel
from appliance.session.first_reads import FirstReads
from appliance.session.grants import Grants
from appliance.session.session_memory import SessionMemory
from appliance.store.store import Store
from appliance.store.store_reader import ReadableStore, StoreReader
from appliance.system.confinement import Surroundings
from appliance.worker.device_loop import DeviceLoop
from appliance.worker.plain_answers import PlainAnswers
from appliance.worker.ring_loop import RingLoop
from appliance.worker.sandbox import MOUNT_RULES, RING_RULES, lock_down

_LOG = logging.getLogger(__name__)


def main(sock: socket.socket, surroundings: Surroundings) -> None:
    """Serve one queue or device until the supervisor closes `sock`.

    Args:
        sock: the worker's end of its channel, which this function owns.
        surroundings: what the worker has from its fork server.
    """
    message = channel.receive(sock)
    if message is None:
        return
    envelope, (session_fd, grants_fd, *device_fds) = message
    config = envelope.configure
    configure_logging(config.log_level, is_json=config.log_json)
    grants = Grants(grants_fd)
    session = SessionMemory(session_fd)
    statistics = session.statistics(config.queue)
    statistics.begin()
    remote = RemoteParts(
        has_blobs=config.has_remote_blobs,
        has_directories=config.has_remote_directories,
        has_root=config.has_remote_root,
        used=lambda keys: channel.send(sock, pb.Envelope(cache_used=pb.CacheUsed(keys=keys))),
    )
    first_reads = None
    if config.is_recorded:
        first_reads = FirstReads(lambda reads: channel.send(sock, pb.Envelope(first_reads=reads)))
    store = _open_store(config)
    plain = None
    # A snapshot that may be lost is checked before anything that was read in it is used.
    if isinstance(store, StoreReader) and store.is_registered:
        plain = PlainAnswers(
            store,
            grants_fd,
            session.memory,
            statistics,
            remote=remote,
            first_reads=first_reads,
            poll_us=config.poll_us,
        )
    new_handler, wanted_flags = _kind_of_handler(config, sock)
    handler = new_handler(
        grants,
        store,
        is_root_listable=config.list_root,
        remote=remote,
        makes_images=config.makes_images,
        first_reads=first_reads,
    )
    dispatcher = Dispatcher(
        handler, session, statistics.requests, wanted_flags=wanted_flags, note=statistics.note
    )
    loop: DeviceLoop | RingLoop
    if device_fds:
        device_loop = DeviceLoop(sock, device_fds[0], dispatcher, handler, statistics, plain)
        loop, rules = device_loop, MOUNT_RULES
    else:
        ring_loop = RingLoop(sock, config.queue, dispatcher, handler, statistics, plain)
        loop, rules = ring_loop, RING_RULES
    if config.HasField("sandbox"):
        lock_down(config.sandbox, surroundings, store.files, rules)
    loop.run()


def _kind_of_handler(
    config: pb.Configure, sock: socket.socket
) -> tuple[type[Handler] | partial[PassthroughHandler], InitFlag]:
    """Return what makes the handler, and the flags of INIT that it wants."""
    if config.device.passthrough:

        def tell_released(nodeid: int) -> None:
            channel.send(sock, pb.Envelope(released=pb.Released(nodeid=nodeid)))

        return partial(PassthroughHandler, released=tell_released), PASSTHROUGH_FLAGS
    return Handler, DEVICE_FLAGS if config.HasField("device") else WANTED_FLAGS


def _open_store(config: pb.Configure) -> ReadableStore:
    # One process uses one LMDB library, so whoever answers decides who reads.
    path = Path(config.store_path)
    if config.answers_in_python:
        return Store.open(path, is_readonly=True)
    store = StoreReader(path)
    if config.HasField("sandbox"):
        store.files.enter_blobs()
    return store
