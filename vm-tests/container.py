"""The container image: built without a daemon, then its root file system is run.

Buildah gives each command the image's root file system, with the capabilities and the filter of
system calls that containers get. `make test-container` runs this; its name keeps it out of
`make test`.
"""

import json
import os
import signal
import socket
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest

from appliance import __version__
from tests.fakes import fuse_client
from tests.fakes.appliance_process import FakeGuest
from tests.fakes.finished_program import output_of
from tests.fakes.frontend import FrontEnd
from tests.fakes.running_command import every_event
from tools.container_image import NAME, Buildah, build_image

DEADLINE_S: Final = 300
CONTENT: Final = b"content"
SOCKET: Final = "web1.sock"


class Container:
    """A container, and the directories that it shares with this host.

    Args:
        buildah: which runs its commands.
        name: that of the container.
        directory: receives `lib`, which is its /var/lib/appliance, and `run`, its /run/appliance.
    """

    def __init__(self, buildah: Buildah, name: str, directory: Path) -> None:
        self.sockets = directory / "run"
        self._buildah = buildah
        self._name = name
        self._volumes = []
        # Buildah would mount volumes that the image declares over those that it is told to mount.
        buildah.run("config", "--volume=/var/lib/appliance-", "--volume=/run/appliance-", name)
        for here, there in (("lib", "/var/lib/appliance"), ("run", "/run/appliance")):
            (directory / here).mkdir()
            self._volumes.append(f"--volume={directory / here}:{there}")

    def command(self, *words: str, options: Sequence[str] = ()) -> list[str]:
        options = [*self._volumes, *options]
        return self._buildah.command("run", *options, self._name, "--", "appliance", *words)

    def run(self, *words: str, options: Sequence[str] = ()) -> str:
        return output_of(*self.command(*words, options=options))


@pytest.fixture(scope="module")
def buildah(tmp_path_factory: pytest.TempPathFactory) -> Buildah:
    directory = tmp_path_factory.mktemp("buildah")
    buildah = Buildah(directory)
    build_image(buildah, directory)
    return buildah


@pytest.fixture(scope="module")
def container(buildah: Buildah, tmp_path_factory: pytest.TempPathFactory) -> Container:
    name = buildah.run("from", "--pull-never", NAME).strip()
    return Container(buildah, name, tmp_path_factory.mktemp("shared"))


@pytest.fixture(scope="module")
def path(container: Container, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Import a tree in the container; return the name of its store path."""
    tree = tmp_path_factory.mktemp("trees") / "tree"
    tree.mkdir()
    (tree / "file").write_bytes(CONTENT)
    options = (f"--volume={tree}:/mnt/tree:ro",)
    printed = container.run("import", "/mnt/tree", options=options)
    return Path(printed.split()[-1]).name


def test_the_image_says_what_it_runs(buildah: Buildah) -> None:
    config = json.loads(buildah.run("inspect", "--type=image", NAME))["OCIv1"]["config"]
    assert config["Entrypoint"] == ["/usr/bin/appliance"]
    assert config["Cmd"] == ["virtiofs", "--listen-dir=/run/appliance"]
    assert set(config["Volumes"]) == {"/var/lib/appliance", "/run/appliance"}


@pytest.mark.parametrize("options", [(), ("--cap-drop=all",)], ids=["usual", "no-capabilities"])
def test_doctor_finds_what_serving_needs(container: Container, options: Sequence[str]) -> None:
    assert container.run("--version", options=options).strip() == f"appliance {__version__}"
    assert "found nothing to mend" in container.run("doctor", "virtiofs", options=options)


@contextmanager
def serving(container: Container, log: Path, *options: str) -> Iterator[None]:
    words = ("virtiofs", f"--socket-path=/run/appliance/{SOCKET}", "--socket-mode=0666")
    with log.open("wb") as out:
        process = subprocess.Popen(
            container.command(*words, options=options),
            stderr=out,
            start_new_session=True,
        )
    try:
        for _ in every_event(DEADLINE_S):
            if b"READY" in log.read_bytes():
                break
            assert process.poll() is None, log.read_text()
        yield
    finally:
        # All of the container's processes, as its end would.
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(DEADLINE_S)


def connected_to(sock: socket.socket, path: Path) -> FakeGuest:
    sock.connect(os.fspath(path))
    return FakeGuest(FrontEnd(sock))


@pytest.mark.parametrize("options", [(), ("--cap-drop=all",)], ids=["usual", "no-capabilities"])
def test_a_guest_outside_reads_what_the_container_serves(
    options: Sequence[str], container: Container, path: str, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    with (
        serving(container, log, *options),
        socket.socket(socket.AF_UNIX) as sock,
        connected_to(sock, container.sockets / SOCKET) as guest,
    ):
        guest.mount()
        file = guest.lookup(guest.lookup(fuse_client.ROOT, path.encode()), b"file")
        assert guest.ask(fuse_client.read(file, 0, 4096)).body == CONTENT
    (locked,) = {
        line.partition("locked down: ")[2]
        for line in log.read_text().splitlines()
        if "worker" in line and "locked down" in line
    }
    assert "a filter of system calls" in locked
