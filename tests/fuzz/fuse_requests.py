"""A fuzzer of FUSE requests through real rings, on two supervisors at once.

One answers plain requests in C, the other leaves all of them to Python. Both serve one store, and
get the same requests in the same order; so their replies are equal, byte for byte, but for a
session's generation and what the file system below the store says of itself.
"""

import contextlib
import itertools
import random
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple, Self

from appliance.fuse_proto._fuse_wire import CODECS, IN_HEADER_SIZE, OUT_HEADER_SIZE, Opcode
from appliance.fuse_proto.opcodes import OPS
from tests.fakes import fuse_client
from tests.fakes.appliance_process import ApplianceProcess
from tests.fakes.hostile_guest import ROOM, ROOT, HostileGuest, descendants
from tests.fakes.running_command import APPLIANCE, DEADLINE_S

# These change the session for the requests after them, so nothing else may be under way.
_TURNS: Final = frozenset({Opcode.INIT, Opcode.DESTROY})
_BATCH: Final = 60
# How many of `RequestFuzzer.whole`, from the first on, are plain.
_PLAIN: Final = 10


class Exchange(NamedTuple):
    """A request, and how many bytes of room its reply has.

    `cuts` are numbers: request and room are cut there, modulo their sizes, into buffers of one
    chain, whose table is then an indirect one.
    """

    request: bytes
    room: int
    cuts: tuple[int, ...] = ()

    def readable(self) -> list[bytes]:
        """Return the request in buffers."""
        ends = _cut(len(self.request), self.cuts)
        return [self.request[at:end] for at, end in itertools.pairwise([0, *ends])]

    def writable(self) -> list[int]:
        """Return the sizes of the buffers of the reply."""
        return [end - at for at, end in itertools.pairwise([0, *_cut(self.room, self.cuts)])]


class Nodes(NamedTuple):
    """The nodes of `hostile_guest.make_tree`, by which all requests name them."""

    top: int
    sub: int
    small: int
    large: int
    link: int


class Side:
    """A supervisor and the guest that it serves."""

    def __init__(self, answers: str, store: Path, name: bytes, directory: Path) -> None:
        self.answers = answers
        self._closing = contextlib.ExitStack()
        self.appliance = self._closing.enter_context(
            ApplianceProcess(
                store,
                directory,
                "--num-request-queues=2",
                "--list-root",
                f"--state-dir={directory / 'state'}",
                sockets=(f"{answers}.sock",),
                prefix=("env", f"APPLIANCE_ANSWERS={answers}"),
                program=APPLIANCE,
            )
        )
        self.guest = self._closing.enter_context(HostileGuest(self.appliance.connect()))
        self.guest.mount()
        top = self.guest.lookup(ROOT, name)
        below = [self.guest.lookup(top, it) for it in (b"sub", b"small", b"large", b"link")]
        self.nodes = Nodes(top, *below)
        # The second word of every entry; it differs from session to session.
        entry = self.guest.ask(fuse_client.lookup(top, b"small")).body
        self.generation = entry[8:16]
        self.pids = descendants(self.appliance.process.pid)

    def close(self) -> None:
        """Leave, and end the supervisor."""
        self._closing.close()

    def exchange(self, exchanges: Sequence[Exchange]) -> list[bytes]:
        """Return the replies, with the same generation on all sides."""
        ring = self.guest.rings[1]
        heads = [
            ring.add_chain(it.readable(), it.writable(), indirect=bool(it.cuts)) for it in exchanges
        ]
        ring.publish()
        used = ring.collect(len(exchanges), timeout_s=DEADLINE_S)
        assert sorted(it.head for it in used) == sorted(heads)
        replies = {it.head: it.data for it in used}
        return [replies[head].replace(self.generation, b"same one") for head in heads]

    def check_alive(self) -> None:
        """No process has ended, and no worker was started anew."""
        (session,) = self.appliance.status()
        assert {worker["restarts"] for worker in session["workers"]} == {0}
        assert descendants(self.appliance.process.pid) == self.pids
        assert "Traceback" not in self.appliance.log()


class RequestFuzzer:
    """Both sides, and the requests that they get."""

    def __init__(self, store: Path, name: bytes, directory: Path) -> None:
        self.num_requests = 0
        self._closing = contextlib.ExitStack()
        self._name = name
        self.sides = [self._new_side(answers, store, directory) for answers in ("c", "python")]
        assert self.sides[0].nodes == self.sides[1].nodes

    def _new_side(self, answers: str, store: Path, directory: Path) -> Side:
        place = directory / answers
        place.mkdir()
        side = Side(answers, store, self._name, place)
        self._closing.callback(side.close)
        return side

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self._closing.close()

    def check(self, exchanges: Sequence[Exchange]) -> None:
        """Send all of them to both sides; every chain comes back, with a reply that may be."""
        for is_turn, group in itertools.groupby(exchanges, _is_turn):
            some = list(group)
            step = 1 if is_turn else _BATCH
            for start in range(0, len(some), step):
                self._check_together(some[start : start + step])
                if is_turn:
                    self.mount()
        self.num_requests += len(exchanges)

    def _check_together(self, exchanges: Sequence[Exchange]) -> None:
        replies, others = (side.exchange(exchanges) for side in self.sides)
        for exchange, reply, other in zip(exchanges, replies, others, strict=True):
            _check_reply(exchange, reply)
            assert _comparable(exchange, reply) == _comparable(exchange, other), exchange

    def mount(self) -> None:
        """Begin anew on both sides."""
        for side in self.sides:
            side.guest.mount()

    def check_alive(self) -> None:
        """Nothing has ended on either side; C has answered where it should, and only there."""
        for side in self.sides:
            side.check_alive()
        reports = [side.appliance.status()[0] for side in self.sides]
        assert reports[0]["plain"] > 0
        assert reports[1]["plain"] == 0
        assert reports[0]["requests"] == reports[1]["requests"], "each is counted once"

    # --- Requests ---

    def whole(self) -> list[bytes]:
        """Return a request of each kind that there is, and several of those that C answers."""
        nodes = self.sides[0].nodes
        known: list[bytes] = [
            fuse_client.lookup(ROOT, self._name),
            fuse_client.lookup(nodes.top, b"small"),
            fuse_client.lookup(nodes.top, b"no such"),
            fuse_client.lookup(nodes.sub, b".."),
            fuse_client.getattr_(nodes.small),
            fuse_client.readlink(nodes.link),
            fuse_client.read(nodes.small, 2, 100),
            fuse_client.read(nodes.large, 70000, 3000),
            fuse_client.readdir(nodes.sub, 7),
            fuse_client.readdirplus(nodes.sub, 290),
            fuse_client.open_(nodes.small),
            fuse_client.opendir(nodes.sub),
            fuse_client.getxattr(nodes.small, b"user.any", 100),
            fuse_client.listxattr(nodes.small, 100),
            fuse_client.access(nodes.small),
            fuse_client.lseek(nodes.large, 100, 3),
            fuse_client.statx(nodes.small),
            fuse_client.statfs(nodes.top),
            fuse_client.forget(nodes.small),
            fuse_client.batch_forget([nodes.small, nodes.link]),
            fuse_client.interrupt(5),
            fuse_client.init(),
        ]
        opcodes = {int.from_bytes(request[4:8], "little") for request in known}
        for op in OPS:
            if op.number not in opcodes:
                body = bytes(CODECS[op.args].size if op.args else 0) + b"name\0" * op.names
                known.append(fuse_client.request(op.number, nodes.top, body + b"more"))
        return [_numbered(request, number) for number, request in enumerate(known, 1)]

    def every_truncation(self) -> Iterator[Exchange]:
        """Yield each request cut at each byte: with the length that is left, and that it had."""
        for request in self.whole():
            for size in range(len(request)):
                yield Exchange(request[:size], ROOM)
                if size >= 4:
                    yield Exchange(size.to_bytes(4, "little") + request[4:size], ROOM)

    def every_byte(self, rng: random.Random) -> Iterator[Exchange]:
        """Yield each request with each of its bytes damaged, by a bit and by another byte."""
        for request in self.whole():
            for at, byte in enumerate(request):
                for value in (byte ^ 1 << rng.randrange(8), rng.choice((0, 0x7F, 0x80, 0xFF))):
                    yield Exchange(request[:at] + bytes([value]) + request[at + 1 :], ROOM)

    def several_bytes(self, rng: random.Random, count: int) -> Iterator[Exchange]:
        """Yield requests with damage in several places, or numbers at borders, and any room."""
        whole = self.whole()
        borders = [0, 1, 4095, 4096, 1 << 31, (1 << 32) - 1, 1 << 63, (1 << 64) - 1]
        for _ in range(count):
            request = bytearray(rng.choice(whole[:_PLAIN] if rng.randrange(3) else whole))
            for _ in range(rng.randrange(5)):
                request[rng.randrange(len(request))] = rng.randrange(256)
            if rng.randrange(2) and len(request) >= IN_HEADER_SIZE + 8:
                at = rng.choice([0, 4, 16, *range(IN_HEADER_SIZE, len(request) - 7, 4)])
                number = rng.choice([*borders, rng.randrange(320), *self.sides[0].nodes])
                size = 8 if at >= 16 and rng.randrange(2) else 4
                request[at : at + size] = number.to_bytes(8, "little")[:size]
            room = rng.choice([0, 1, 15, 16, 17, 150, 160, 1000, ROOM])
            cuts = (rng.randrange(1, 1 << 16) for _ in range(rng.choice((0, 0, 1, 2, 9))))
            yield Exchange(bytes(request), room, tuple(cuts))


def _cut(size: int, cuts: tuple[int, ...]) -> list[int]:
    """Return where the buffers end that make up `size` bytes, none of them empty."""
    return sorted({it % size for it in cuts} - {0} | {size}) if size else []


def _numbered(request: bytes, unique: int) -> bytes:
    return request[:8] + unique.to_bytes(8, "little") + request[16:]


def _opcode(request: bytes) -> int:
    return int.from_bytes(request[4:8], "little")


def _is_turn(exchange: Exchange) -> bool:
    return _opcode(exchange.request) in _TURNS


def _check_reply(exchange: Exchange, reply: bytes) -> None:
    request = exchange.request
    assert len(reply) <= exchange.room
    if not reply:
        return
    answer = fuse_client.parse_reply(reply)
    if len(request) >= IN_HEADER_SIZE:
        assert answer.unique == struct.unpack_from("<Q", request, 8)[0]


def _comparable(exchange: Exchange, reply: bytes) -> bytes:
    # How much room the file system has can change between two requests.
    if _opcode(exchange.request) == Opcode.STATFS:
        return reply[:OUT_HEADER_SIZE]
    return reply


def play(fuzzer: RequestFuzzer, seed: int, count: int) -> None:
    """Send `count` damaged requests of `seed`."""
    fuzzer.check(list(fuzzer.several_bytes(random.Random(seed), count)))
