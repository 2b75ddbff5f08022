"""The archive of a report: what is in it, and above all what is not."""

import base64
import os
import random
import re
import secrets
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from appliance.cli.redaction import redacted
from tests.fakes import fuse_client
from tests.fakes.appliance_process import ApplianceProcess, FakeGuest, import_tree
from tests.fakes.running_command import APPLIANCE, DEADLINE_S

ROOT: Final = 1
# The same in each process that collects the tests.
RANDOM: Final = random.Random(1)
SECRET: Final = "hunter2-" + RANDOM.randbytes(8).hex()
NIX_KEY: Final = "cache.example.org-1:" + base64.b64encode(RANDOM.randbytes(64)).decode()
PUBLIC_KEY: Final = "cache.example.org-1:" + base64.b64encode(bytes(32)).decode()
PEM: Final = (
    "-----BEGIN EC PRIVATE KEY-----\n"
    + base64.encodebytes(RANDOM.randbytes(90)).decode()
    + "-----END EC PRIVATE KEY-----\n"
)


@pytest.mark.parametrize(
    ("text", "left"),
    [
        (f"https://user:{SECRET}@host/path", "https://***@host/path"),
        (f'"s3://AKIA:{SECRET}@bucket?region=eu"', '"s3://***@bucket?region=***"'),
        (
            f"https://host/x?wait-connect=1&sig={SECRET} y",
            "https://host/x?wait-connect=1&sig=*** y",
        ),
        (f"signed by {NIX_KEY}", "signed by ***"),
        (f"trusts {PUBLIC_KEY}", f"trusts {PUBLIC_KEY}"),
        (f"before\n{PEM}after", "before\n***\nafter"),
        (PEM[:80], "***"),
        (f"Authorization: Bearer {SECRET}", "Authorization: ***"),
        (f"AWS_SECRET_ACCESS_KEY={SECRET}", "AWS_SECRET_ACCESS_KEY=***"),
        (f'{{"token": "{SECRET}", "size": 3}}', '{"token": "***", "size": 3}'),
        ("lmdb:///var/lib/appliance/store", "lmdb:///var/lib/appliance/store"),
        ("grpc+unix:/run/a.sock", "grpc+unix:/run/a.sock"),
        ("mail someone@example.org about 12:30", "mail someone@example.org about 12:30"),
    ],
)
def test_what_opens_doors_is_taken_out(text: str, left: str) -> None:
    assert redacted(text) == left


class Reported:
    """An archive, unpacked by tar(1)."""

    def __init__(self, archive: Path, directory: Path) -> None:
        self.listing = subprocess.run(
            ["tar", "-tvzf", archive], check=True, capture_output=True, text=True
        ).stdout
        subprocess.run(["tar", "-xzf", archive, "-C", directory], check=True)
        self.files = {path.name: path.read_bytes() for path in directory.glob("*/*")}

    def text(self, name: str) -> str:
        return self.files[name].decode()


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Reported, bytes]]:
    """A report of a supervisor that has served a file, and the content of that file."""
    content = secrets.token_hex(64).encode()
    tree = tmp_path_factory.mktemp("trees") / "tree"
    tree.mkdir()
    (tree / "file").write_bytes(content)
    directory = tmp_path_factory.mktemp("served")
    (name,) = import_tree(directory / "store", tree)
    log = directory / "other.log"
    log.write_text(
        f"fetching from https://user:{SECRET}@host/\n{PEM}signed by {NIX_KEY}\nlast line\n"
    )
    config = directory / "appliance.toml"
    config.write_text(f'store = "objectstore+s4://key:{SECRET}@bucket"\n')
    environ = os.environ | {
        "APPLIANCE_CONFIG": str(config),
        "APPLIANCE_STATE_DIR": str(directory / "store.state"),
        "APPLIANCE_TOKEN": SECRET,
        "OTHER_VARIABLE": SECRET,
        "BLOB_SERVICE_ADDR": "",
    }
    with (
        ApplianceProcess(directory / "store", directory) as process,
        FakeGuest(process.connect()) as guest,
    ):
        guest.mount()
        nodeid = guest.lookup(guest.lookup(ROOT, name.encode()), b"file")
        assert guest.ask(fuse_client.read(nodeid, 0, 4096)).body == content
        ended = subprocess.run(
            [
                *(*APPLIANCE, "bugreport", "--store", process.uri),
                *(f"--log={log}", f"--log={process.log_path}"),
            ],
            check=True,
            cwd=directory,
            env=environ,
            stdout=subprocess.PIPE,
            text=True,
            timeout=4 * DEADLINE_S,
        )
        archive = directory / ended.stdout.strip()
        assert archive.stat().st_mode & 0o777 == 0o600
        yield Reported(archive, tmp_path_factory.mktemp("unpacked")), content


@pytest.mark.slow
def test_a_report_has_what_is_needed(reported: tuple[Reported, bytes]) -> None:
    report, _content = reported
    assert all(line.startswith("-rw-------") for line in report.listing.splitlines())
    assert report.text("versions.txt").startswith("appliance ")
    assert "aiohttp " in report.text("versions.txt")
    assert f"APPLIANCE_STATE_DIR={os.sep}" in report.text("options.txt")
    # A fault in the configuration keeps no report from being made.
    refused, _, *values = report.text("config.txt").splitlines()
    assert re.match(r"refused: /\S*/appliance.toml:1: store: ", refused)
    assert re.match(r'store = "lmdb:///\S*/store"  # command line$', values[0])
    assert "Linux version" in report.text("host.txt")
    assert '"subject"' in report.text("doctor.json")
    assert '"READ": 1' in report.text("status.json")
    assert 'opcode="READ"' in report.text("metrics.txt")
    assert report.text("processes.txt").count("VmRSS") >= 3  # supervisor, session, and a worker
    assert "last line" in report.text("log0.txt")
    assert "READY" in report.text("log1.txt")
    assert {"units.txt", "journal.txt"} < set(report.files)


@pytest.mark.slow
def test_a_report_has_no_contents_keys_or_passwords(reported: tuple[Reported, bytes]) -> None:
    report, content = reported
    forbidden = [content, SECRET.encode(), NIX_KEY[30:].encode(), PEM.splitlines()[1].encode()]
    for name, data in report.files.items():
        for secret in forbidden:
            assert secret not in data, name
        assert b"OTHER_VARIABLE" not in data


@pytest.mark.slow
def test_a_host_where_nothing_works_can_be_reported(tmp_path: Path) -> None:
    address = f"nonsense://user:{SECRET}@host"
    ended = subprocess.run(
        [*APPLIANCE, "bugreport", "-o", tmp_path / "r.tar.gz"],
        check=False,
        env=os.environ | {"APPLIANCE_STORE": address},
        capture_output=True,
        text=True,
        timeout=4 * DEADLINE_S,
    )
    assert ended.returncode == 0, ended.stderr
    unpacked = tmp_path / "unpacked"
    unpacked.mkdir()
    report = Reported(tmp_path / "r.tar.gz", unpacked)
    assert "cannot be had" in report.text("status.json")
    assert "nonsense" in report.text("options.txt")
    assert SECRET.encode() not in b"".join(report.files.values())
    # Never over a file that is there.
    again = subprocess.run(
        [*APPLIANCE, "bugreport", "-o", tmp_path / "r.tar.gz"], check=False, capture_output=True
    )
    assert (again.returncode, b"File exists" in again.stderr) == (2, True)
