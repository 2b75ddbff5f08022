"""Build logs and realisations: what Nix sends comes back, and nothing else is taken."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from appliance.errors import ServiceLimitError
from appliance.http_cache.documents import Documents, is_signed, parse_realisation
from appliance.nix.signing import PublicKey
from tests.fakes.http_process import HttpProcess
from tests.http_cache.conftest import Nix, Served

pytestmark = pytest.mark.slow

EXPRESSION = """
let build = name: input: derivation {
  inherit name; system = builtins.currentSystem; builder = "/bin/sh"; PATH = "/usr/bin:/bin";
  args = [ "-c" "echo building ${name} >&2; echo ${name} ${input} > $out" ];
  __contentAddressed = true; outputHashMode = "recursive"; outputHashAlgo = "sha256";
};
in build "top" (build "dependency" "")
"""
DERIVATION = f"{'0' * 32}-x.drv"
ID = f"sha256:{'0' * 64}!out"


class Builder(Nix):
    """Nix that builds content-addressed derivations, and signs what it builds."""

    def __init__(self, directory: Path, keys: Path) -> None:
        directory.mkdir()
        super().__init__(directory)
        self.environ["NIX_CONFIG"] += (
            "extra-experimental-features = ca-derivations\n"
            "sandbox-paths = /bin /lib /lib64 /usr\n"
            f"secret-key-files = {keys}/secret\n"
        )
        self.file = directory / "default.nix"
        self.file.write_text(EXPRESSION)

    def build(self, *options: str) -> str:
        command = ("nix", "build", "--store", self.store, "--no-link", "-f", self.file)
        return self.run(*command, "--print-build-logs", *options)

    def derivation(self, name: str) -> str:
        """Return the base name of the derivation that was built; it has a log."""
        logs = (self.root / "nix" / "var" / "log" / "nix" / "drvs").rglob(f"*-{name}.drv.bz2")
        (log,) = logs
        return f"{log.parent.name}{log.name.removesuffix('.bz2')}"


@pytest.fixture(scope="module")
def builder(tmp_path_factory: pytest.TempPathFactory, keys: Path) -> Builder:
    builder = Builder(tmp_path_factory.mktemp("builder") / "nix", keys)
    builder.build()
    return builder


def requiring(keys: Path) -> list[str]:
    public = (keys / "public").read_text().strip()
    return ["--require-signatures", "--trusted-public-keys", public]


@pytest.fixture
def server(tmp_path: Path, keys: Path) -> Iterator[HttpProcess]:
    store = ("--store", f"lmdb://{tmp_path}/store")
    with HttpProcess(store, tmp_path / "http", "--allow-put", *requiring(keys)) as server:
        yield server


def test_realisations_are_substituted(
    server: HttpProcess, builder: Builder, keys: Path, tmp_path: Path
) -> None:
    copying = ("nix", "copy", "--from", builder.store, "--to", server.url, "-f", builder.file)
    builder.run(*copying)
    found = sorted((tmp_path / "store" / "http" / "realisations").iterdir())
    assert len(found) == 2
    for path in found:
        reply = server.ask(f"/realisations/{path.name}")
        realisation = parse_realisation(reply.body, path.name.removesuffix(".doi"))
        # Nix has signed it, and we verify that.
        assert is_signed(realisation, [PublicKey.parse((keys / "public").read_text().strip())])
    other = Builder(tmp_path / "other", keys)
    said = other.build(
        *("--option", "substituters", server.url, "--option", "require-sigs", "true"),
        *("--option", "trusted-public-keys", (keys / "public").read_text().strip()),
    )
    assert "copying path" in said
    assert "building top" not in said


def test_realisations_are_signed_when_sent(builder: Builder, keys: Path, tmp_path: Path) -> None:
    # Without the signatures of the builder, Nix trusts that of the cache.
    options = ("--allow-put", "--sign", keys / "secret")
    with HttpProcess(
        ("--store", f"lmdb://{tmp_path}/store"), tmp_path / "http", *options
    ) as server:
        copying = ("nix", "copy", "--from", builder.store, "--to", server.url, "-f", builder.file)
        builder.run(*copying)
        for path in (tmp_path / "store" / "http" / "realisations").iterdir():
            realisation = json.loads(path.read_bytes())
            path.write_text(json.dumps({**realisation, "signatures": []}))
        other = Builder(tmp_path / "other", keys)
        said = other.build(
            *("--option", "substituters", server.url, "--option", "require-sigs", "true"),
            *("--option", "trusted-public-keys", (keys / "public").read_text().strip()),
        )
        assert "building top" not in said


def test_logs_come_back(server: HttpProcess, builder: Builder, tmp_path: Path) -> None:
    derivations = {name: builder.derivation(name) for name in ("top", "dependency")}
    for derivation in derivations.values():
        copying = ("nix", "store", "copy-log", "--from", builder.store, "--to", server.url)
        builder.run(*copying, f"/nix/store/{derivation}")
    logs = builder.root / "nix" / "var" / "log"
    logs.rename(tmp_path / "log")
    try:
        for name, derivation in derivations.items():
            asking = ("nix", "log", "--store", builder.store)
            cache = ("--option", "substituters", server.url)
            said = builder.run(*asking, *cache, f"/nix/store/{derivation}")
            assert f"building {name}" in said
            reply = server.ask(f"/log/{derivation}")
            assert f"building {name}\n".encode() in reply.body
            assert reply.headers["Content-Type"].startswith("text/plain")
    finally:
        (tmp_path / "log").rename(logs)


def test_a_log_keeps_its_coding_and_is_replaced(server: HttpProcess) -> None:
    assert server.ask(f"/log/{DERIVATION}").status == 404
    for coding, body in (("xz", b"\xfd7zXZ"), ("identity", b"plain"), ("zstd", b"\x28\xb5")):
        headers = {"Content-Encoding": coding}
        sent = server.ask(f"/log/{DERIVATION}", method="PUT", body=body, headers=headers)
        assert sent.status == 201
        reply = server.ask(f"/log/{DERIVATION}")
        assert reply.body == body
        assert reply.headers.get("Content-Encoding", "identity") == coding


def realisation(**changed: object) -> bytes:
    fields = {"id": ID, "outPath": f"{'0' * 32}-out", "signatures": [], **changed}
    return json.dumps(fields).encode()


@pytest.mark.parametrize(
    ("path", "body", "status", "reason"),
    [
        (f"log/{'0' * 32}-x", b"", 400, "does not end in .drv"),
        ("log/x.drv", b"", 400, "too short for a store path"),
        (f"log/{'0' * 32}-..%2fx.drv", b"", 400, "log: "),
        (f"realisations/{ID}.doi", b"garbage", 400, "not JSON"),
        (f"realisations/{ID}.doi", b"[" * 100_000, 400, "not JSON"),
        (f"realisations/{ID}.doi", b"[]", 400, "has no id or no outPath"),
        (f"realisations/{ID}.doi", realisation(id="x"), 400, "has the id 'x'"),
        (f"realisations/{ID}.doi", realisation(outPath="x"), 400, "too short for a store path"),
        (f"realisations/{ID}.doi", realisation(signatures=["x"]), 400, "no colon"),
        (f"realisations/{ID}.doi", realisation(signatures={}), 400, "is not a list"),
        (f"realisations/{ID}.doi", realisation(), 400, "no trusted key has signed it"),
        ("realisations/sha256:0!out.doi", realisation(), 400, "is not sha256:HEX!OUTPUT"),
        (f"realisations/{ID}.doi", b" " * (2 << 20), 413, "Maximum request body size"),
    ],
)
def test_what_is_refused(
    server: HttpProcess, tmp_path: Path, path: str, body: bytes, status: int, reason: str
) -> None:
    reply = server.ask(f"/{path}", method="PUT", body=body)
    assert (reply.status, reason in reply.body.decode()) == (status, True), reply.body
    kept = [found for found in (tmp_path / "store" / "http").rglob("*") if found.is_file()]
    assert kept == []


def test_a_realisation_needs_its_path_and_is_not_changed(tmp_path: Path) -> None:
    store = ("--store", f"lmdb://{tmp_path}/store")
    with HttpProcess(store, tmp_path / "http", "--allow-put") as server:
        reply = server.ask(f"/realisations/{ID}.doi", method="PUT", body=realisation())
        assert (reply.status, b"which is missing" in reply.body) == (400, True)
    documents = Documents(tmp_path / "documents")
    documents.put_realisation(json.loads(realisation()))
    other = json.loads(realisation(outPath=f"{'1' * 32}-other"))
    with pytest.raises(Exception, match="is there, not 1111"):
        documents.put_realisation(other)
    assert documents.realisation(ID) == json.loads(realisation())


def test_there_is_room_for_some_only(tmp_path: Path) -> None:
    documents = Documents(tmp_path / "documents", maximum=100)

    def put(name: str, size: int) -> None:
        with documents.new_file() as file:
            file.write(bytes(size))
            documents.put_log(name, None, file)

    put(DERIVATION, 60)
    with pytest.raises(ServiceLimitError, match="would take 101 bytes, the limit is 100"):
        put(f"{'1' * 32}-y.drv", 41)
    put(DERIVATION, 100)
    again = Documents(tmp_path / "documents", maximum=100)
    with again.new_file() as file:
        file.write(b"x")
        with pytest.raises(ServiceLimitError):
            again.put_log(f"{'1' * 32}-y.drv", None, file)


def test_services_elsewhere_keep_none(tmp_path: Path) -> None:
    with HttpProcess(("--store", "memory:"), tmp_path / "http", "--allow-put") as server:
        assert server.ask(f"/log/{DERIVATION}").status == 404
        reply = server.ask(f"/log/{DERIVATION}", method="PUT", body=b"x")
        assert (reply.status, b"with a local store only" in reply.body) == (403, True)
        assert server.ask(f"/realisations/{ID}.doi").status == 404


def test_metrics_count_what_was_asked(served: Served) -> None:
    server = served.server
    server.ask(f"/{served.digest}.narinfo")
    server.ask("/0123456789abcdfghijklmnpqrsvwxyz.narinfo")
    server.ask("/nowhere", method="PATCH")
    reply = server.ask("/metrics")
    assert reply.headers["Content-Type"].startswith("application/openmetrics-text")
    text = reply.body.decode()
    assert text.endswith("# EOF\n")
    samples = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    for labels in (
        'kind="narinfo",method="GET",status="200"',
        'kind="narinfo",method="GET",status="404"',
        'kind="other",method="other",status="404"',
    ):
        assert float(samples[f"appliance_http_requests_total{{{labels}}}"]) >= 1
    assert float(samples["appliance_http_connections"]) >= 1
    before = float(samples["appliance_http_sent_bytes_total"])
    size = len(server.ask(f"/{served.digest}.ls").body)
    after = re.search(r"sent_bytes_total ([\d.e+]+)", server.ask("/metrics").body.decode())
    assert after is not None
    assert float(after[1]) - before == size
