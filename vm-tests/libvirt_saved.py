"""Domains of a newer libvirt that are saved, restored and moved, and whose devices are exchanged.

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


@pytest.fixture(scope="module")
def other_host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DomainHost]:
    with domain_host(tmp_path_factory.mktemp("other"), is_newer=True) as found:
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


def test_a_domain_moves_to_another_host_and_back(host: DomainHost, other_host: DomainHost) -> None:
    with host.domain_by_binary() as domain:
        domain.console.wait_for("turn 2: all is right", "extra 1: imported")
        for _ in range(3):
            domain.move_to(other_host.libvirtd)
            domain.move_to(host.libvirtd)
    assert "the state of a saved guest was loaded" in other_host.libvirtd.back_end_log("by-binary")
