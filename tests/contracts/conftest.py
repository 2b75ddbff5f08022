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


def _rig(kind: str, request: pytest.FixtureRequest, directory: Path) -> Rig:
    match kind:
        case "memory":
            return Rig("memory:")
        case "lmdb":
            return Rig(f"lmdb://{directory}/store")
        case "grpc+unix":
            return Rig(request.getfixturevalue("daemon").unix_uri)
        case _:
            return Rig(request.getfixturevalue("daemon").tcp_uri)


@pytest.fixture(params=["memory", "lmdb", "grpc+unix", "grpc+http"])
def rig(request: pytest.FixtureRequest, tmp_path: Path) -> Rig:
    """Return each back end in turn; those behind a daemon keep what other tests put."""
    return _rig(request.param, request, tmp_path)


@pytest.fixture(params=["lmdb", "grpc+unix", "grpc+http"])
def shared_rig(request: pytest.FixtureRequest, tmp_path: Path) -> Rig:
    """Return each back end that outlives the process using it."""
    return _rig(request.param, request, tmp_path)
