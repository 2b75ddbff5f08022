from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.contracts.rig import Rig
from tests.fakes.daemon_process import DaemonProcess


@pytest.fixture(scope="session")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    directory = tmp_path_factory.mktemp("daemon")
    with DaemonProcess(f"lmdb://{directory}/store", directory) as process:
        yield process


@pytest.fixture(params=["memory", "lmdb", "grpc+unix", "grpc+http"])
def rig(request: pytest.FixtureRequest, tmp_path: Path) -> Rig:
    """Return each back end in turn; those behind a daemon keep what other tests put."""
    match request.param:
        case "memory":
            return Rig("memory:")
        case "lmdb":
            return Rig(f"lmdb://{tmp_path}/store")
        case "grpc+unix":
            return Rig(request.getfixturevalue("daemon").unix_uri)
        case _:
            return Rig(request.getfixturevalue("daemon").tcp_uri)
