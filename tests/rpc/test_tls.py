"""Services behind TLS, as whoever has a certificate for them sees them."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import grpc
import pytest

from appliance.rpc.server import Server
from appliance.services.addresses import MemoryAddress, ServiceAddresses
from appliance.services.open_services import LoopThread, open_services
from tests.fakes.appliance_process import APPLIANCE

pytestmark = pytest.mark.slow

CONTENT = b"over TLS"


class Authority:
    """A certificate authority, and a certificate of it for a host."""

    def __init__(self, directory: Path, host: str) -> None:
        directory.mkdir()
        self.root = directory / "root.pem"
        self._directory = directory
        new_key = ("req", "-newkey", "rsa:2048", "-nodes", "-batch")
        root = ("-x509", "-subj", "/CN=authority", "-keyout", "root.key", "-out", "root.pem")
        self._openssl(*new_key, *root)
        self._openssl(*new_key, "-subj", f"/CN={host}", "-keyout", "host.key", "-out", "host.csr")
        (directory / "host.ext").write_text(f"subjectAltName=DNS:{host}\n")
        signing = ("-CA", "root.pem", "-CAkey", "root.key", "-CAcreateserial")
        wanted = ("-in", "host.csr", "-extfile", "host.ext", "-out", "host.pem")
        self._openssl("x509", "-req", *signing, *wanted)

    def credentials(self) -> grpc.ServerCredentials:
        key = (self._directory / "host.key").read_bytes()
        return grpc.ssl_server_credentials([(key, (self._directory / "host.pem").read_bytes())])

    def _openssl(self, *arguments: str) -> None:
        command = ["openssl", *arguments]
        subprocess.run(command, check=True, capture_output=True, cwd=self._directory)


@pytest.fixture(scope="module")
def authorities(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Authority]:
    top = tmp_path_factory.mktemp("authorities")
    return {host: Authority(top / host, host) for host in ("localhost", "elsewhere")}


def serve(authority: Authority) -> Iterator[str]:
    async def start() -> tuple[AsyncExitStack, Server, int]:
        stack = AsyncExitStack()
        addresses = ServiceAddresses(MemoryAddress(), MemoryAddress(), MemoryAddress())
        server = Server(await stack.enter_async_context(open_services(addresses)))
        port = server._server.add_secure_port("localhost:0", authority.credentials())
        await server.start()
        return stack, server, port

    thread = LoopThread("tls")
    stack, server, port = thread.run_and_wait(start())
    yield f"grpc+https://localhost:{port}"
    thread.run_and_wait(server.stop(0))
    thread.run_and_wait(stack.aclose())
    thread.close()


@pytest.fixture(scope="module")
def uri(authorities: dict[str, Authority]) -> Iterator[str]:
    yield from serve(authorities["localhost"])


@pytest.fixture(scope="module")
def uri_of_another_name(authorities: dict[str, Authority]) -> Iterator[str]:
    yield from serve(authorities["elsewhere"])


def run(*arguments: str | Path, trusted: Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [*APPLIANCE, *arguments],
        env={**os.environ, "GRPC_DEFAULT_SSL_ROOTS_FILE_PATH": str(trusted)},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_service_with_a_trusted_certificate_is_used(
    authorities: dict[str, Authority], uri: str, tmp_path: Path
) -> None:
    root = authorities["localhost"].root
    (tmp_path / "file").write_bytes(CONTENT)

    imported = run("import", "--store", uri, tmp_path / "file", trusted=root)
    assert imported.returncode == 0, imported.stderr
    shown = run("cat", "--store", uri, imported.stdout.strip(), trusted=root)
    assert shown.stdout == CONTENT.decode()


def check_refusal(done: "subprocess.CompletedProcess[str]", uri: str, reason: str) -> None:
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"appliance: dns:///{uri.removeprefix('grpc+https://')}: ")
    assert reason in done.stderr


def test_certificate_that_nobody_trusts_is_refused(
    authorities: dict[str, Authority], uri: str
) -> None:
    done = run("path-info", "--store", uri, trusted=authorities["elsewhere"].root)
    check_refusal(done, uri, "CERTIFICATE_VERIFY_FAILED")


def test_certificate_for_another_host_is_refused(
    authorities: dict[str, Authority], uri_of_another_name: str
) -> None:
    done = run("path-info", "--store", uri_of_another_name, trusted=authorities["elsewhere"].root)
    check_refusal(done, uri_of_another_name, "Hostname Verification Check failed")
