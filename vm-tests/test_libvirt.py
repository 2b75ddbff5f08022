"""Domains of Debian's libvirt (9.0, with TCG) whose root is a store path.

QEMU 7.2 does not save guests with vhost-user-fs. Asked to attach a virtiofs device with a program
of its own, libvirtd 9.0 ends with a segmentation fault, whatever the program, so that this is left
out here; `libvirt_saved.py` shows both with newer ones.
"""

from collections.abc import Iterator

import pytest
from vmharness.domain_host import DomainHost, domain_host


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DomainHost]:
    with domain_host(tmp_path_factory.mktemp("libvirt")) as found:
        yield found


def test_a_domain_with_the_program_as_its_binary(host: DomainHost) -> None:
    with host.domain_by_binary() as domain:
        domain.check_life()
        domain.detach(mounts=1)


def test_a_domain_with_the_socket_of_a_server(host: DomainHost) -> None:
    with host.domain_by_socket() as domain:
        domain.check_life()
        domain.check_hotplug()
