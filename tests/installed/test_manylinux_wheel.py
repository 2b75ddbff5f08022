"""The wheel for manylinux, on a host without a compiler and without the library that is in it."""

import json
import os
import re
import signal
import socket
import subprocess
import zipfile
from pathlib import Path
from typing import Final, NamedTuple

import pytest

from tests.fakes import fuse_client
from tests.fakes.appliance_process import FakeGuest
from tests.fakes.finished_program import output_of
from tests.fakes.frontend import FrontEnd
from tests.fakes.installed_wheel import install
from tests.fakes.running_command import DEADLINE_S, every_event
from tools.manylinux_wheel import build_manylinux_wheel

# The glibc of Debian 12 is 2.36, and pip refuses a wheel for a newer one.
GLIBC_MINOR_MAX: Final = 36
CONTENT: Final = b"content"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_manylinux_wheel(tmp_path_factory.mktemp("wheel"))


class Installed(NamedTuple):
    """Programs of an environment, and how to run them where the system has no LMDB."""

    programs: Path
    prefix: list[str]


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    programs = install(wheel, tmp_path_factory.mktemp("installed"))
    libraries = sorted(Path("/usr/lib").glob("*/liblmdb.so*"))
    assert libraries, "the wheel is built with a library of the system"
    hide = "; ".join(f"mount --bind /dev/null {library.resolve()}" for library in libraries)
    path = f"PATH={programs}"  # so there is no compiler either
    prefix = ["unshare", "--mount", "sh", "-ec", f'{hide}; exec /usr/bin/env {path} "$@"', "sh"]
    return Installed(programs, prefix)


def test_its_tag_fits_debian_12(wheel: Path) -> None:
    tag = re.search(r"-manylinux_2_(\d+)_x86_64\.whl$", wheel.name)
    assert tag is not None, wheel.name
    assert int(tag[1]) <= GLIBC_MINOR_MAX


def test_it_brings_the_library_and_all_modules(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert len([name for name in names if re.match(r"appliance/_\w+\.cpython.*\.so$", name)]) >= 5
    (library,) = (name for name in names if name.startswith("appliance.libs/") and ".so" in name)
    assert "liblmdb" in library
    assert any(name.endswith("/licenses/LICENSE.lmdb") for name in names)


def test_a_guest_reads_what_it_imports_and_serves(installed: Installed, tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "file").write_bytes(CONTENT)
    appliance = [*installed.prefix, str(installed.programs / "appliance")]
    assert output_of(*appliance, "--version", cwd=tmp_path).startswith("appliance ")
    store = f"--store=lmdb://{tmp_path}/store"
    path = Path(output_of(*appliance, "import", store, "tree", cwd=tmp_path).strip())
    log_path = tmp_path / "log"
    with log_path.open("wb") as log:
        served = subprocess.Popen(
            [*appliance, "virtiofs", store, f"--socket-path={tmp_path}/fs.sock"], stderr=log
        )
    try:
        for _ in every_event(DEADLINE_S):
            if b"READY" in log_path.read_bytes():
                break
            assert served.poll() is None, log_path.read_text()
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(os.fspath(tmp_path / "fs.sock"))
        with FakeGuest(FrontEnd(sock)) as guest:
            guest.mount()
            top = guest.lookup(fuse_client.ROOT, os.fsencode(path.name))
            file = guest.lookup(top, b"file")
            assert guest.ask(fuse_client.read(file, 0, 4096)).body == CONTENT
            status = json.loads(output_of(*appliance, "status", "--json", store, cwd=tmp_path))
            (session,) = status["sessions"]
            maps = [Path(f"/proc/{one['pid']}/maps").read_text() for one in session["workers"]]
        assert served.poll() is None
    finally:
        served.send_signal(signal.SIGTERM)
        served.wait(DEADLINE_S)
    assert maps
    assert all("appliance.libs/liblmdb" in text for text in maps)
