from collections.abc import Iterator

import pytest

from tests.fakes.daemon_process import DaemonProcess


@pytest.fixture(scope="session")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    directory = tmp_path_factory.mktemp("daemon")
    with DaemonProcess(f"lmdb://{directory}/store", directory) as process:
        yield process


@pytest.fixture
def target(daemon: DaemonProcess) -> str:
    return f"unix:{daemon.socket}"
