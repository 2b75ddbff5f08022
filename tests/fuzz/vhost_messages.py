"""A fuzzer of vhost-user messages, against the session processes of a real supervisor.

Each play is a connection of its own: a real VMM's messages in their order, some of them damaged,
then messages at random, with descriptors of any kind. It ends when the back-end has closed its end,
which it must do once ours is closed. Meanwhile a neighbour's guest is served as if nothing had
happened.
"""

import contextlib
import os
import random
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, Self

from appliance.bounds import MESSAGE_FDS_MAX
from appliance.errors import BenchError
from appliance.vhost._vhost_wire import (
    CODECS,
    HEADER_SIZE,
    Config,
    Header,
    HeaderFlag,
    Inflight,
    Log,
    MemReg,
    MemTable,
    Region,
    StateTransfer,
    VirtioFeature,
    VringAddr,
    VringFlag,
    VringState,
    Word,
    pack_header,
    pack_region,
)
from appliance.vhost.requests import REQUESTS, RequestRow
from tests.fakes import fuse_client
from tests.fakes.appliance_process import ApplianceProcess, FakeGuest
from tests.fakes.driver import DriverRing, GuestMemory
from tests.fakes.frontend import FrontEnd, RefusedError
from tests.fakes.hostile_guest import ROOT, descendants, num_fds
from tests.fakes.running_command import DEADLINE_S, every_event
from tests.fakes.vmms import CloudHypervisor, Crosvm, NewerQemu, Qemu, Uml, Vmm
from tests.fuzz.device_states import BORDERS, damaged_state

_VMMS: Final[Sequence[Callable[[FrontEnd], Vmm]]] = (
    Qemu,
    NewerQemu,
    CloudHypervisor,
    Crosvm,
    Uml,
)
_FEATURES: Final = (0x170000000, 0x170000000 | VirtioFeature.LOG_ALL)
_SERVED: Final = tuple(row for row in REQUESTS if row.refused is None)
_RECEIVE_BYTES: Final = 65536
_REPLY_S: Final = 0.5


class DamagingFrontEnd(FrontEnd):
    """A front-end some of whose messages are damaged, in payload, size, flags and descriptors."""

    def __init__(self, sock: socket.socket, rng: random.Random, *, one_in: int) -> None:
        # A damaged message may have no reply at all, so nobody waits long for one.
        super().__init__(sock, timeout_s=_REPLY_S)
        self.rng = rng
        self._one_in = one_in

    def send(
        self,
        request: int,
        payload: bytes = b"",
        fds: Sequence[int] = (),
        flags: int = HeaderFlag.VERSION_1,
    ) -> None:
        rng = self.rng
        if rng.randrange(self._one_in):
            super().send(request, payload, fds, flags)
            return
        self.num_sent += 1
        damaged = bytearray(payload)
        for _ in range(rng.randrange(4) if damaged else 0):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        if not rng.randrange(4):
            damaged = damaged[: rng.randrange(len(damaged) + 1)]
        if not rng.randrange(6):
            damaged += rng.randbytes(rng.randrange(64))
        size = len(damaged) if rng.randrange(8) else rng.choice(BORDERS) & 0xFFFFFFFF
        if not rng.randrange(6):
            flags ^= 1 << rng.randrange(4)
        if not rng.randrange(8):
            request = rng.choice((0, rng.randrange(60), rng.getrandbits(32)))
        with contextlib.ExitStack() as stack:
            if not rng.randrange(3):
                more = (self._any_fd(stack) for _ in range(rng.randrange(3)))
                fds = [*fds, *more][:MESSAGE_FDS_MAX]
                rng.shuffle(fds)
            elif not rng.randrange(3):
                fds = fds[1:]
            self._send_all(pack_header(Header(request, flags, size)) + bytes(damaged), fds)

    def _any_fd(self, stack: contextlib.ExitStack) -> int:
        fds = _any_fds(self.rng)
        for fd in fds:
            stack.callback(os.close, fd)
        return fds[0]

    def _send_all(self, data: bytes, fds: Sequence[int]) -> None:
        # In two parts now and then: a header may come alone, or byte by byte.
        cut = self.rng.choice((len(data), len(data), 1, HEADER_SIZE - 1, HEADER_SIZE))
        try:
            socket.send_fds(self.sock, [data[:cut]], list(fds))
            if data[cut:]:
                self.sock.sendall(data[cut:])
        except (ConnectionError, TimeoutError) as exc:
            raise BenchError("the back-end takes no more") from exc

    def drain(self) -> None:
        """Take what has come back, and wait for nothing."""
        self._receive_all(0)
        self.sock.settimeout(_REPLY_S)

    def end(self) -> None:
        """Close our direction, and wait until the back-end has closed its end."""
        with contextlib.suppress(OSError):  # the back-end was first
            self.sock.shutdown(socket.SHUT_WR)
        self._receive_all(DEADLINE_S)

    def _receive_all(self, timeout_s: float) -> None:
        self.sock.settimeout(timeout_s)
        with contextlib.suppress(ConnectionError, BlockingIOError):
            while True:
                data, fds, _flags, _address = socket.recv_fds(
                    self.sock, _RECEIVE_BYTES, MESSAGE_FDS_MAX
                )
                for fd in fds:
                    os.close(fd)
                if not data:
                    return


def _any_fds(rng: random.Random) -> list[int]:
    """Return new descriptors, of which the first is to be sent."""
    match rng.randrange(9):
        case 0:
            return [os.eventfd(rng.choice((0, 5)), os.EFD_CLOEXEC)]
        case 1:
            return list(os.pipe())
        case 2:
            return list(os.pipe())[::-1]
        case 3:
            ours, theirs = socket.socketpair(
                type=rng.choice((socket.SOCK_STREAM, socket.SOCK_DGRAM))
            )
            return [ours.detach(), theirs.detach()]
        case 4:
            return [os.open("/", rng.choice((os.O_RDONLY, os.O_PATH)) | os.O_CLOEXEC)]
        case 5:
            return [os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)]
        case 6:
            return [os.open("/proc/self/status", os.O_RDONLY | os.O_CLOEXEC)]
        case _:
            fd = os.memfd_create("any")
            os.ftruncate(fd, rng.choice((0, 1, 4096, 1 << 20, 1 << 40)))
            return [fd]


class _Writer:
    """Makes messages that could be meant, for guest memory and rings that are there."""

    def __init__(self, rng: random.Random, memory: GuestMemory, rings: list[DriverRing]) -> None:
        self._rng = rng
        self._memory = memory
        self._rings = rings
        self._makers: dict[str, Callable[[], bytes]] = {
            "Word": self._word,
            "VringState": self._vring_state,
            "VringAddr": self._vring_addr,
            "MemTable": self._mem_table,
            "MemReg": self._mem_reg,
            "Config": self._config,
            "Inflight": self._inflight,
            "Log": self._log,
            "StateTransfer": self._state_transfer,
        }

    def payload(self, row: RequestRow) -> bytes:
        if row.payload is None:
            return self._rng.randbytes(8) if row.refused and self._rng.randrange(2) else b""
        make = self._makers.get(row.payload)
        return make() if make else self._rng.randbytes(CODECS[row.payload].size)

    def fds(self, row: RequestRow, stack: contextlib.ExitStack) -> list[int]:
        rng = self._rng
        count = rng.choice((row.fds[0], min(row.fds[1], 2)))
        found: list[int] = []
        for _ in range(count):
            if row.name in {"SET_MEM_TABLE", "ADD_MEM_REG"} and rng.randrange(4):
                found.append(self._memory.fd)
            elif rng.randrange(2):
                ring = rng.choice(self._rings)
                found.append(rng.choice((ring.kick_fd, ring.call_fd, ring.err_fd)))
            else:
                fds = _any_fds(rng)
                for fd in fds:
                    stack.callback(os.close, fd)
                found.append(fds[0])
        return found

    def _number(self) -> int:
        return self._rng.choice((*BORDERS, self._rng.getrandbits(64)))

    def _word(self) -> bytes:
        value = self._rng.choice((0, 1, 0x100, 0x101, *_FEATURES, self._number()))
        return CODECS["Word"].pack(Word(value))

    def _vring_state(self) -> bytes:
        num = self._rng.choice((0, 1, 64, 128, self._number() & 0xFFFFFFFF))
        return CODECS["VringState"].pack(VringState(self._rng.randrange(4), num))

    def _vring_addr(self) -> bytes:
        layout = self._rng.choice(self._rings).layout()
        ring = self._rng.randrange(3)
        addr = [layout.desc, layout.used, layout.avail]
        if not self._rng.randrange(3):
            addr[self._rng.randrange(3)] += self._rng.choice((1, 2, 16, 1 << 20, 1 << 40))
        flags, log_addr = self._rng.choice(((0, 0), (VringFlag.LOG, 0), (VringFlag.LOG, -64)))
        log_addr = self._rng.choice((log_addr % (1 << 64), self._number()))
        whole = VringAddr(ring, flags, addr[0], addr[1], addr[2], log_addr)
        return CODECS["VringAddr"].pack(whole)

    def _region(self) -> Region:
        region = Region._make(self._rng.choice(self._memory.regions))
        if self._rng.randrange(3):
            return region
        field = self._rng.choice(Region._fields)
        return region._replace(**{field: self._number()})

    def _mem_table(self) -> bytes:
        regions = [self._region() for _ in range(self._rng.randrange(4))]
        table: bytes = CODECS["MemTable"].pack(MemTable(len(regions)))
        return table + b"".join(map(pack_region, regions))

    def _mem_reg(self) -> bytes:
        return CODECS["MemReg"].pack(MemReg(self._region()))

    def _config(self) -> bytes:
        size = self._rng.choice((0, 1, 36, 40, 256))
        offset = self._rng.choice((0, 36, self._number() & 0xFFFFFFFF))
        return CODECS["Config"].pack(Config(offset, size, self._rng.randrange(2))) + bytes(size)

    def _log(self) -> bytes:
        size = self._rng.choice((1, 4096, 1 << 17, self._number()))
        return CODECS["Log"].pack(Log(size, self._rng.choice((0, 0, 4096, self._number()))))

    def _state_transfer(self) -> bytes:
        transfer = StateTransfer(self._rng.randrange(3), int(not self._rng.randrange(8)))
        return CODECS["StateTransfer"].pack(transfer)

    def _inflight(self) -> bytes:
        size = self._rng.choice((4096, 1 << 20, self._number()))
        queues = self._rng.choice((0, 1, 2, 3, 0xFFFF))
        wanted = Inflight(
            size, self._rng.choice((0, 4096)), queues, self._rng.choice((0, 64, 128, 3))
        )
        return CODECS["Inflight"].pack(wanted)


class MessageFuzzer:
    """A supervisor with two sockets: one that is attacked, and a neighbour's."""

    def __init__(self, store: Path, name: bytes, directory: Path) -> None:
        self.num_messages = 0
        self._name = name
        self._closing = contextlib.ExitStack()
        self.appliance = self._closing.enter_context(
            ApplianceProcess(
                store,
                directory,
                "--num-request-queues=1",
                "--tag=t",
                f"--state-dir={directory / 'state'}",
                sockets=("attacked", "neighbour"),
            )
        )
        self._neighbour = self._closing.enter_context(FakeGuest(self.appliance.connect(1)))
        self._neighbour.mount()
        assert self._neighbour.lookup(ROOT, name)
        with FakeGuest(self.appliance.connect(0)) as guest:  # whatever is made once
            guest.mount()
        self._await_quiet(lambda: True)
        self._fds = self._num_fds()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self._closing.close()

    def play(self, seed: int) -> None:
        """One connection, from its first message to its end."""
        rng = random.Random(seed)
        with contextlib.ExitStack() as stack:
            sock = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            sock.connect(os.fspath(self.appliance.sockets[0]))
            memory = stack.enter_context(GuestMemory())
            rings = [DriverRing(memory, 64) for _ in range(2)]
            for ring in rings:
                stack.callback(ring.close)
                ring.add_chain([fuse_client.init()], [4096])
                ring.publish()
            front_end = DamagingFrontEnd(sock, rng, one_in=rng.choice((5, 20, 1000)))
            vmm = rng.choice(_VMMS)(front_end)
            stack.callback(vmm.close)
            with contextlib.suppress(BenchError, AssertionError, OSError, ValueError):
                vmm.realize()
                vmm.start(memory, rings)
            with contextlib.suppress(BenchError):
                self._send_any(front_end, _Writer(rng, memory, rings), rings)
            front_end.end()
            self.num_messages += front_end.num_sent
        assert self._neighbour.ask(fuse_client.getattr_(ROOT)).error == 0

    def _send_any(
        self, front_end: DamagingFrontEnd, writer: _Writer, rings: Sequence[DriverRing]
    ) -> None:
        rng = front_end.rng
        for _ in range(rng.randrange(60)):
            # What is never served, or fails without an ack, ends most connections.
            row = rng.choice(_SERVED if rng.randrange(12) else REQUESTS)
            flags = HeaderFlag.VERSION_1
            if rng.randrange(12):
                flags |= HeaderFlag.NEED_REPLY
            with contextlib.ExitStack() as stack:
                front_end.send(row.number, writer.payload(row), writer.fds(row, stack), flags)
            front_end.drain()
            ring = rng.choice(rings)
            if not rng.randrange(3):
                with contextlib.suppress(BufferError):  # none has come back lately
                    ring.add_chain([fuse_client.getattr_(ROOT)], [160])
                    ring.publish()
                ring.kick()

    def play_state(self, seed: int, count: int) -> int:
        """Load `count` damaged states of sessions; return how many were taken.

        The session goes on whatever they say, and one that was saved just now is taken.
        """
        rng = random.Random(seed)
        num_taken = 0
        front_end = self.appliance.connect(0)
        with FakeGuest(front_end, vmm=NewerQemu(front_end)) as guest:
            guest.mount()
            assert guest.lookup(ROOT, self._name)
            bases = guest.vmm.stop()
            state = front_end.save_state()
            for _ in range(count):
                num_taken += front_end.load_state(damaged_state(state, rng)) == 0
            assert front_end.load_state(state) == 0
            guest.vmm.start(guest.memory, guest.rings, bases)
            assert guest.lookup(ROOT, self._name)
            self.num_messages += front_end.num_sent
        return num_taken

    def replace_descriptors(self, seed: int, count: int) -> list[int]:
        """Send `count` messages with descriptors over one connection, which none of them ends.

        Returns:
            How many descriptors the session process has at the start, and after each half.
        """
        rng = random.Random(seed)
        rows = [row for row in _SERVED if row.fds[1] and row.reply == "ack"]
        with contextlib.ExitStack() as stack:
            sock = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            sock.connect(os.fspath(self.appliance.sockets[0]))
            memory = stack.enter_context(GuestMemory())
            rings = [DriverRing(memory, 64) for _ in range(2)]
            for ring in rings:
                stack.callback(ring.close)
            front_end = FrontEnd(sock, timeout_s=DEADLINE_S)
            vmm = Qemu(front_end)
            stack.callback(vmm.close)
            vmm.realize()
            vmm.start(memory, rings)
            front_end.acks = True
            writer = _Writer(rng, memory, rings)
            nums = [self._num_session_fds(front_end)]
            for _ in range(2):
                for _ in range(count // 2):
                    row = rng.choice(rows)
                    with contextlib.ExitStack() as sent, contextlib.suppress(RefusedError):
                        front_end.act(row.number, writer.payload(row), writer.fds(row, sent))
                    self.num_messages += 1
                nums.append(self._num_session_fds(front_end))
        return nums

    def _num_session_fds(self, front_end: FrontEnd) -> int:
        front_end.get_features()  # whatever came before has been served
        attacked = os.fspath(self.appliance.sockets[0])
        pids = [it["pid"] for it in self.appliance.status() if it["socket"] == attacked]
        return sum(map(num_fds, pids))

    def check(self) -> None:
        """Nothing is left of those who were here, and no bug has shown."""
        self._await_quiet(lambda: self._num_fds() <= self._fds)
        assert self._neighbour.lookup(ROOT, self._name)
        (session,) = self.appliance.status()
        assert [worker["restarts"] for worker in session["workers"]] == [0]
        assert "Traceback" not in self.appliance.log()

    def _num_fds(self) -> int:
        pid = self.appliance.process.pid
        return sum(num_fds(it) for it in (pid, *descendants(pid)))

    def _await_quiet(self, is_quiet: Callable[[], bool]) -> None:
        """Wait until only the fork server and the neighbour's session and worker are there."""
        pid = self.appliance.process.pid
        for _ in every_event(DEADLINE_S):
            with contextlib.suppress(FileNotFoundError):  # one has just ended
                if len(descendants(pid)) == 3 and is_quiet():
                    return
        raise AssertionError(f"processes {descendants(pid)}, {self._num_fds()} descriptors")
