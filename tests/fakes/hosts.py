"""Several hosts on one machine: network namespaces, joined by a switch in another one.

Needs root. A process runs on a host if its command begins with `Host.prefix`; it has the same file
systems as this one.
"""

import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Final, NamedTuple, Self

from pyroute2 import NetNS, netns

_NUMBERS: Final = itertools.count()
_NETWORK: Final = "10.77.0"


class Host(NamedTuple):
    """A host of a `Network`."""

    namespace: str
    address: str
    # Its cable, in the namespace of the switch.
    cable: str

    @property
    def prefix(self) -> list[str]:
        return ["nsenter", f"--net=/var/run/netns/{self.namespace}"]


class Network:
    """Hosts with these names; each reaches the others."""

    def __init__(self, *names: str) -> None:
        tag = f"appliance-{os.getpid()}-{next(_NUMBERS)}"
        self._switch = f"{tag}-switch"
        self.hosts = {
            name: Host(f"{tag}-{name}", f"{_NETWORK}.{number}", f"cable{number}")
            for number, name in enumerate(names, start=1)
        }
        self._namespaces: list[str] = []
        try:
            self._build()
        except BaseException:
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
        for namespace in self._namespaces:
            netns.remove(namespace)
        self._namespaces.clear()

    @contextmanager
    def cut(self, name: str) -> Iterator[None]:
        """Let no packet to or from a host through in the block; neither end is told."""
        self._set_cable(name, "down")
        try:
            yield
        finally:
            self._set_cable(name, "up")

    def _set_cable(self, name: str, state: str) -> None:
        # The host's own end stays up, and keeps its address; only the carrier goes.
        with NetNS(self._switch) as switch:
            (index,) = switch.link_lookup(ifname=self.hosts[name].cable)
            switch.link("set", index=index, state=state)

    def _create(self, namespace: str) -> None:
        netns.create(namespace)
        self._namespaces.append(namespace)

    def _build(self) -> None:
        self._create(self._switch)
        with NetNS(self._switch) as switch:
            switch.link("add", ifname="bridge", kind="bridge")
            (bridge,) = switch.link_lookup(ifname="bridge")
            switch.link("set", index=bridge, state="up")
            for host in self.hosts.values():
                self._create(host.namespace)
                peer = {"ifname": "eth0", "net_ns_fd": host.namespace}
                switch.link("add", ifname=host.cable, kind="veth", peer=peer)
                (cable,) = switch.link_lookup(ifname=host.cable)
                switch.link("set", index=cable, master=bridge, state="up")
                with NetNS(host.namespace) as inside:
                    (loopback,) = inside.link_lookup(ifname="lo")
                    inside.link("set", index=loopback, state="up")
                    (card,) = inside.link_lookup(ifname="eth0")
                    inside.addr("add", index=card, address=host.address, prefixlen=24)
                    inside.link("set", index=card, state="up")
