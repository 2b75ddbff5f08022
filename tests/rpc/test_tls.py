"""A daemon that speaks TLS, its clients, and whom it serves."""

import os
import socket
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes.daemon_process import DaemonProcess
from tests.fakes.running_command import APPLIANCE

pytestmark = pytest.mark.slow

CONTENT = b"over TLS"
# Not that of root.
GROUP = 4711


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
        (directory / "host.ext").write_text(f"subjectAltName={host}\n")
        signing = ("-CA", "root.pem", "-CAkey", "root.key", "-CAcreateserial")
        wanted = ("-in", "host.csr", "-extfile", "host.ext", "-out", "host.pem")
        self._openssl("x509", "-req", *signing, *wanted)

    def server_options(self) -> list[str]:
        """Return the options of a daemon with the certificate of the host."""
        return [f"--tls-cert={self._directory}/host.pem", f"--tls-key={self._directory}/host.key"]

    def client_parameters(self) -> str:
        """Return the parameters of an address for a client with that certificate."""
        files = f"{self._directory}/host"
        return f"tls-client-cert-path={files}.pem&tls-client-key-path={files}.key"

    def _openssl(self, *arguments: str) -> None:
        command = ["openssl", *arguments]
        subprocess.run(command, check=True, capture_output=True, cwd=self._directory)


@pytest.fixture(scope="module")
def authorities(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Authority]:
    top = tmp_path_factory.mktemp("authorities")
    hosts = {"localhost": "IP:::1", "elsewhere": "DNS:elsewhere"}
    return {name: Authority(top / name, host) for name, host in hosts.items()}


def serve(directory: Path, *options: str) -> Iterator[DaemonProcess]:
    with DaemonProcess(f"lmdb://{directory}/store", directory, options=options) as daemon:
        yield daemon


def uri_of(daemon: DaemonProcess, *parameters: str) -> str:
    uri = f"grpc+https://{daemon.tcp}"
    return "?".join([uri, "&".join(parameters)]) if parameters else uri


@pytest.fixture(scope="module")
def daemon(
    authorities: dict[str, Authority], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[DaemonProcess]:
    options = authorities["localhost"].server_options()
    yield from serve(tmp_path_factory.mktemp("daemon"), *options)


@pytest.fixture(scope="module")
def choosy_daemon(
    authorities: dict[str, Authority], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[DaemonProcess]:
    """A daemon that serves clients with a certificate of the other authority."""
    options = authorities["localhost"].server_options()
    clients = f"--tls-client-ca={authorities['elsewhere'].root}"
    yield from serve(tmp_path_factory.mktemp("choosy"), *options, clients)


def run(*arguments: str | Path, trusted: Path | None = None) -> "subprocess.CompletedProcess[str]":
    trust = {} if trusted is None else {"GRPC_DEFAULT_SSL_ROOTS_FILE_PATH": str(trusted)}
    return subprocess.run(
        [*APPLIANCE, *arguments],
        env={**os.environ, **trust},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def check_use(uri: str, tmp_path: Path, trusted: Path | None = None) -> None:
    (tmp_path / "file").write_bytes(CONTENT)
    imported = run("import", "--store", uri, tmp_path / "file", trusted=trusted)
    assert imported.returncode == 0, imported.stderr
    shown = run("cat", "--store", uri, imported.stdout.strip(), trusted=trusted)
    assert shown.stdout == CONTENT.decode()


def check_refusal(done: "subprocess.CompletedProcess[str]", uri: str, reason: str) -> None:
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1
    host = uri.removeprefix("grpc+https://").partition("?")[0]
    assert done.stderr.startswith(f"appliance: dns:///{host}: ")
    assert reason in done.stderr


def test_daemon_with_a_trusted_certificate_is_used(
    authorities: dict[str, Authority], daemon: DaemonProcess, tmp_path: Path
) -> None:
    root = authorities["localhost"].root
    check_use(uri_of(daemon), tmp_path, trusted=root)
    check_use(uri_of(daemon, f"tls-ca-cert-path={root}", "wait-connect=1"), tmp_path)
    # Sockets in the file system are not encrypted.
    check_use(daemon.unix_uri, tmp_path)


def test_certificate_that_nobody_trusts_is_refused(
    authorities: dict[str, Authority], daemon: DaemonProcess
) -> None:
    wrong = f"tls-ca-cert-path={authorities['elsewhere'].root}"
    for uri in (uri_of(daemon, wrong), uri_of(daemon, wrong, "wait-connect=1")):
        check_refusal(run("path-info", "--store", uri), uri, "CERTIFICATE_VERIFY_FAILED")


def test_certificate_for_another_host_is_refused(
    authorities: dict[str, Authority], tmp_path: Path
) -> None:
    elsewhere = authorities["elsewhere"]
    for daemon in serve(tmp_path, *elsewhere.server_options()):
        uri = uri_of(daemon, f"tls-ca-cert-path={elsewhere.root}")
        done = run("path-info", "--store", uri)
        check_refusal(done, uri, "Hostname Verification Check failed")


def test_only_clients_of_the_authority_are_served_where_one_is_named(
    authorities: dict[str, Authority], choosy_daemon: DaemonProcess, tmp_path: Path
) -> None:
    trust = f"tls-ca-cert-path={authorities['localhost'].root}"
    own = authorities["elsewhere"].client_parameters()
    check_use(uri_of(choosy_daemon, trust, own), tmp_path)
    others = authorities["localhost"].client_parameters()
    for parameters in ((trust,), (trust, others)):
        done = run("path-info", "--store", uri_of(choosy_daemon, *parameters))
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)


def test_mount_of_a_host_is_served_by_a_daemon_with_tls_before_another(
    authorities: dict[str, Authority], choosy_daemon: DaemonProcess, tmp_path: Path
) -> None:
    trust = f"tls-ca-cert-path={authorities['localhost'].root}"
    uri = uri_of(choosy_daemon, trust, authorities["elsewhere"].client_parameters())
    with DaemonProcess(uri, tmp_path / "before") as before:
        check_use(before.unix_uri, tmp_path)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--tls-cert=FILE"], "--tls-cert and --tls-key need each other"),
        (["--tls-key=FILE"], "--tls-cert and --tls-key need each other"),
        (["--tls-client-ca=FILE"], "--tls-client-ca: needs --tls-cert and --tls-key"),
        (["--tls-cert=/no", "--tls-key=FILE"], "--tls-cert /no: No such file"),
        (["--tls-cert=FILE", "--tls-key=FILE"], "not a certificate and its key in PEM format"),
        (["--listen-mode=888"], "--listen-mode 888: expected permissions in octal"),
        (["--listen-group=nobody-has-it"], "--listen-group nobody-has-it: no such group"),
    ],
)
def test_bad_options_are_a_line_each(tmp_path: Path, options: list[str], reason: str) -> None:
    (tmp_path / "file").write_text("neither certificate nor key\n")
    words = [option.replace("FILE", str(tmp_path / "file")) for option in options]
    store = f"lmdb://{tmp_path}/store"
    done = run("daemon", "--store", store, f"--listen-address={tmp_path}/sock", *words)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert reason in done.stderr


def test_key_of_another_certificate_is_refused(
    authorities: dict[str, Authority], tmp_path: Path
) -> None:
    cert, _key = authorities["localhost"].server_options()
    _cert, key = authorities["elsewhere"].server_options()
    done = run("daemon", "--store", f"lmdb://{tmp_path}/store", cert, key)
    assert done.returncode == 2
    assert "KEY_VALUES_MISMATCH" in done.stderr


def test_missing_file_of_an_address_is_named(daemon: DaemonProcess) -> None:
    uri = uri_of(daemon, "tls-ca-cert-path=/no/such.pem")
    done = run("path-info", "--store", uri)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.endswith("tls-ca-cert-path /no/such.pem: No such file or directory\n")


def test_socket_has_the_mode_and_the_group_that_are_asked_for(tmp_path: Path) -> None:
    for daemon in serve(tmp_path, "--listen-mode=606", f"--listen-group={GROUP}"):
        status = daemon.socket.stat()
        assert (stat.S_IMODE(status.st_mode), status.st_gid) == (0o606, GROUP)
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(daemon.socket))
