"""Where domains run: a libvirtd, a store with what they need, and their back-ends.

A domain finds its file systems either in a program that libvirt starts for each of them, or behind
the sockets of a server. Both must leave nothing behind.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tests.fakes.appliance_process import ApplianceProcess, uri_of
from tests.fakes.running_command import every_event
from vmharness.domain import Domain, import_root
from vmharness.libvirt import DEADLINE_S, Libvirtd


class DomainHost(NamedTuple):
    """libvirtd, and a store with the two paths of a domain."""

    libvirtd: Libvirtd
    store: Path
    root: str
    extra: str

    @contextlib.contextmanager
    def domain_by_binary(self) -> Iterator[Domain]:
        """Run a domain whose back-ends libvirt starts, by `<binary>`."""
        libvirtd, name = self.libvirtd, "by-binary"
        num_descriptors = libvirtd.num_descriptors()
        root, extra = (
            f"<binary path='{libvirtd.program}'/><source dir='/nix/store/{path}'/>"
            for path in (self.root, self.extra)
        )
        with contextlib.closing(Domain(libvirtd, name, root, extra)) as domain:
            assert len(libvirtd.back_ends()) >= 2
            yield domain
        self._check_end(num_descriptors, libvirtd.back_end_log(name))
        for _ in every_event(DEADLINE_S):
            if not libvirtd.back_ends():
                return
        raise AssertionError(f"processes are left: {libvirtd.back_ends()}")

    @contextlib.contextmanager
    def domain_by_socket(self) -> Iterator[Domain]:
        """Run a domain with the sockets of a server, by `<source socket>`."""
        directory = self.libvirtd.directory / "server"
        directory.mkdir()
        sockets = (f"root.sock,root={self.root}", f"extra.sock,root={self.extra}")
        with ApplianceProcess(self.store, directory, sockets=sockets) as server:
            descriptors = Path(f"/proc/{server.process.pid}/fd")
            num_descriptors = self.libvirtd.num_descriptors()
            num_of_server = len(list(descriptors.iterdir()))
            sources = (f"<source socket='{path}'/>" for path in server.sockets)
            with contextlib.closing(Domain(self.libvirtd, "by-socket", *sources)) as domain:
                yield domain
            self._check_end(num_descriptors, server.log())
            for _ in every_event(DEADLINE_S):
                if not server.status() and len(list(descriptors.iterdir())) == num_of_server:
                    return
            raise AssertionError(f"{server.status()}, {list(descriptors.iterdir())}")

    def _check_end(self, num_descriptors: int, back_end_log: str) -> None:
        assert self.libvirtd.virsh("list", "--all", "--name") == ""
        assert self.libvirtd.num_descriptors() == num_descriptors
        assert "front-end connected" in back_end_log
        for word in ("WARNING", "ERROR", "Traceback"):
            assert word not in back_end_log, back_end_log


@contextlib.contextmanager
def domain_host(directory: Path, *, is_newer: bool = False) -> Iterator[DomainHost]:
    """Run libvirtd over a store with what a domain needs.

    Args:
        directory: receives the store, sockets and logs.
        is_newer: whether libvirt and QEMU are those of `newer_debian`.
    """
    store = directory / "store"
    root, extra = import_root(store, directory)
    shared = [f"/nix/store/{name}" for name in (root, extra)]
    with Libvirtd(directory, uri_of(store), shared, is_newer=is_newer) as libvirtd:
        yield DomainHost(libvirtd, store, root, extra)
