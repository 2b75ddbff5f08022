"""Domains of a newer libvirt that are saved and restored, and whose devices are exchanged.

`make libvirt-saved` runs this; its name keeps it out of `make test`, as it downloads a newer QEMU
and libvirt. TEST_QEMU_SUITE says from which Debian.
"""

from collections.abc import Iterator

import pytest
from vmharness.domain_host import DomainHost, domain_host


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DomainHost]:
    with domain_host(tmp_path_factory.mktemp("libvirt"), is_newer=True) as found:
        print(found.libvirtd.virsh("version"))
        yield found


def test_a_domain_with_the_program_as_its_binary(host: DomainHost) -> None:
    with host.domain_by_binary() as domain:
        domain.check_life()
        domain.check_saving()
        domain.check_hotplug()
        domain.check_reset()


def test_a_domain_with_the_socket_of_a_server(host: DomainHost) -> None:
    with host.domain_by_socket() as domain:
        domain.check_life()
        domain.check_saving()
        domain.check_hotplug()
        domain.check_reset()
