"""A real `appliance virtiofs` process, and a fake guest that speaks FUSE through real rings."""

import json
import os
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.fakes import fuse_client
from tests.fakes.driver import DriverRing, GuestMemory
from tests.fakes.frontend import FrontEnd
from tests.fakes.running_command import APPLIANCE, DEADLINE_S, RunningCommand
from tests.fakes.vmms import Qemu, Vmm


def import_tree(store: Path | str, *paths: Path, options: Sequence[str] = ()) -> list[str]:
    """Import with the real command; return the base names of the store paths."""
    result = subprocess.run(
        [*APPLIANCE, "import", "--store", uri_of(store), *options, *map(str, paths)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return [Path(line).name for line in result.stdout.splitlines()]


class ApplianceProcess(RunningCommand):
    """`appliance virtiofs` on sockets in `directory`, up when the constructor returns.

    What follows a comma in one of `sockets` is an option of that socket.
    """

    def __init__(
        self,
        store: Path | str,
        directory: Path,
        *options: str,
        sockets: Sequence[str] = ("fs.sock",),
        prefix: Sequence[str] = (),
        program: Sequence[str] = APPLIANCE,
    ) -> None:
        self.store = Path(store)
        self.uri = uri_of(store)
        self._state = [option for option in options if option.startswith("--state-dir")]
        self.sockets = [directory / name.partition(",")[0] for name in sockets]
        log_path = directory / "virtiofs.log"
        log_path.unlink(missing_ok=True)
        super().__init__(
            [
                *prefix,
                *program,
                "virtiofs",
                "--store",
                self.uri,
                *(f"--socket-path={directory / name}" for name in sockets),
                *options,
            ],
            log_path,
        )

    def connect(self, index: int = 0) -> FrontEnd:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.connect(os.fspath(self.sockets[index]))
        return FrontEnd(sock)

    def status(self) -> list[dict[str, Any]]:
        sessions: list[dict[str, Any]] = json.loads(self.status_text("--json"))["sessions"]
        return sessions

    def waiting(self) -> list[dict[str, Any]]:
        waiting: list[dict[str, Any]] = json.loads(self.status_text("--json"))["waiting"]
        return waiting

    def status_text(self, *options: str) -> str:
        return subprocess.run(
            [*APPLIANCE, "status", *options, "--store", self.uri, *self._state],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        ).stdout


class FakeGuest:
    """Guest memory, a hiprio ring and request rings, and a VMM that connects them to a back-end."""

    def __init__(
        self,
        front_end: FrontEnd,
        *,
        num_request_queues: int = 1,
        num: int = 128,
        vmm: Vmm | None = None,
    ) -> None:
        self.memory = GuestMemory()
        self.rings = [DriverRing(self.memory, num) for _ in range(1 + num_request_queues)]
        self.vmm = vmm or Qemu(front_end, 1 + num_request_queues)
        self._unique = 0
        try:
            self.vmm.realize()
            self.vmm.start(self.memory, self.rings)
        except BaseException:  # no `with` block has it yet
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        self.vmm.close()
        for ring in self.rings:
            ring.close()
        self.memory.close()

    def send(self, request: bytes, *, room: int = 4096, queue: int = 1) -> int:
        """Put one request into a ring without waiting; return its head."""
        ring = self.rings[queue]
        head = ring.add_chain([request], [16, room] if room else [])
        ring.publish()
        return head

    def ask(self, request: bytes, *, room: int = 4096, queue: int = 1) -> fuse_client.Answer:
        """Send one request and return its answer."""
        self.send(request, room=room, queue=queue)
        (used,) = self.rings[queue].collect(timeout_s=DEADLINE_S)
        return fuse_client.parse_reply(used.data)

    def mount(self, queue: int = 1) -> None:
        """Negotiate as Linux 6.1 does."""
        assert self.ask(fuse_client.init(), queue=queue).error == 0

    def lookup(self, nodeid: int, name: bytes) -> int:
        """Return the nodeid of a name that is there."""
        answer = self.ask(fuse_client.lookup(nodeid, name))
        assert answer.error == 0, answer
        return fuse_client.parse_entry(answer.body).nodeid


def uri_of(store: Path | str) -> str:
    """Return the address of a store: a directory in LMDB, or as it is."""
    return store if isinstance(store, str) else f"lmdb://{store}"
