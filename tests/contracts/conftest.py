from collections.abc import Iterator
from pathlib import Path

import pytest

from appliance.services.grpc_messages import SNIX, TVIX
from tests.contracts.rig import Rig
from tests.fakes.daemon_process import DaemonProcess
from tests.fakes.strict_server import Peer, StrictServer, strict_server


@pytest.fixture(scope="session")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    directory = tmp_path_factory.mktemp("daemon")
    with DaemonProcess(f"lmdb://{directory}/store", directory) as process:
        yield process


@pytest.fixture(scope="session")
def daemon_of_objects(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    directory = tmp_path_factory.mktemp("daemon-of-objects")
    with DaemonProcess(f"objectstore+file://{directory}/objects", directory) as process:
        yield process


@pytest.fixture(scope="session")
def snix_like(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StrictServer]:
    with strict_server(tmp_path_factory.mktemp("snix"), Peer(SNIX)) as server:
        yield server
        assert server.resets == []


@pytest.fixture(scope="session")
def tvix_like(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StrictServer]:
    peer = Peer(TVIX, sends_headers_first=True)
    with strict_server(tmp_path_factory.mktemp("tvix"), peer) as server:
        yield server
        assert server.resets == []


def _rig(kind: str, request: pytest.FixtureRequest, directory: Path) -> Rig:
    match kind:
        case "memory":
            return Rig("memory:")
        case "lmdb":
            return Rig(f"lmdb://{directory}/store")
        case "objectstore+memory":
            return Rig("objectstore+memory:", cuts_over=0)
        case "objectstore+file":
            return Rig(f"objectstore+file://{directory}/objects", cuts_over=0)
        case "objectstore+s3":
            uri = request.getfixturevalue("s3").uri("contracts")
            return Rig(uri, cuts_over=0, is_slow=True)
        case "grpc+unix, objects behind it":
            uri = request.getfixturevalue("daemon_of_objects").unix_uri
            return Rig(uri, cuts_over=0, is_slow=True)
        case "grpc+unix":
            return Rig(request.getfixturevalue("daemon").unix_uri)
        case "grpc+http":
            return Rig(request.getfixturevalue("daemon").tcp_uri)
        case "grpc+unix, other stack":
            return Rig(request.getfixturevalue("snix_like").unix_uri)
        case _:
            return Rig(request.getfixturevalue("tvix_like").tcp_uri)


_GRPC = ["grpc+unix", "grpc+http", "grpc+unix, other stack", "grpc+http, other stack"]


_OBJECT_STORES = ["objectstore+file", "objectstore+s3", "grpc+unix, objects behind it"]


@pytest.fixture(params=["memory", "lmdb", *_GRPC, "objectstore+memory", *_OBJECT_STORES])
def rig(request: pytest.FixtureRequest, tmp_path: Path) -> Rig:
    """Return each back end in turn; those behind a daemon keep what other tests put."""
    return _rig(request.param, request, tmp_path)


@pytest.fixture(params=["lmdb", *_GRPC, *_OBJECT_STORES])
def shared_rig(request: pytest.FixtureRequest, tmp_path: Path) -> Rig:
    """Return each back end that outlives the process using it."""
    return _rig(request.param, request, tmp_path)
