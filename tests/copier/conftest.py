"""A closure that Nix made, and stores to copy it into."""

import asyncio
import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from appliance.nix.path_info import read_path_info
from appliance.services.addresses import ServiceAddresses, parse_service_uri
from appliance.services.nar_render import render_nar
from appliance.services.open_services import open_services
from tests.copier.nix_closure import NixClosure, make_closure
from tests.fakes.running_command import APPLIANCE


class Ran(NamedTuple):
    """How a command ended."""

    status: int
    lines: list[str]
    errors: str


class CopiedStore(NamedTuple):
    """A store that is copied into."""

    uri: str

    def run(
        self,
        *words: str | Path,
        status: int = 0,
        data: bytes = b"",
        environ: Mapping[str, str] | None = None,
    ) -> Ran:
        command, *rest = map(str, words)
        done = subprocess.run(
            [*APPLIANCE, command, "--store", self.uri, *rest],
            input=data,
            capture_output=True,
            check=False,
            timeout=60,
            env={**os.environ, **(environ or {})},
        )
        assert done.returncode == status, (done.stdout, done.stderr)
        return Ran(done.returncode, done.stdout.decode().splitlines(), done.stderr.decode())

    def path_infos(self) -> dict[str, dict[str, Any]]:
        """Return what `appliance path-info --json` says of all paths."""
        (line,) = self.run("path-info", "--json").lines
        infos: dict[str, dict[str, Any]] = json.loads(line)
        return infos

    def nars(self) -> dict[str, bytes]:
        """Return the NARs of all paths."""
        address = parse_service_uri(self.uri)

        async def work() -> dict[str, bytes]:
            addresses = ServiceAddresses(address, address, address)
            nars = {}
            async with open_services(addresses, is_readonly=True) as services:
                async for encoded in services.path_infos.list():
                    info = read_path_info(encoded)
                    pieces = render_nar(info.node, services.blobs, services.directories)
                    nars[info.path.absolute()] = b"".join([piece async for piece in pieces])
            return nars

        return asyncio.run(work())

    def check_equals(
        self, closure: NixClosure, paths: Sequence[str], without: Sequence[str] = ()
    ) -> None:
        """Check that just `paths` are there, as they are in the Nix store.

        Args:
            closure: where they are from.
            paths: all that were copied.
            without: what the way of copying does not bring along.
        """
        assert self.run("verify").lines[0].endswith("failures: 0")
        infos = self.path_infos()
        expected = closure.nix.path_infos(*paths)
        assert infos.keys() == expected.keys()
        for path, info in infos.items():
            for name, value in info.items():
                stated = None if name in without else expected[path].get(name)
                assert value == (stated or type(value)()), (path, name)
        nars = self.nars()
        assert nars.keys() == infos.keys()
        for path, nar in nars.items():
            assert nar == closure.nix.dump(path)

    def check_is_empty(self) -> None:
        """Check that no path is there, and no temporary file."""
        assert self.path_infos() == {}
        directory = Path(self.uri.removeprefix("lmdb://"))
        assert [path for path in (directory / "tmp").rglob("*") if path.is_file()] == []


@pytest.fixture(scope="session")
def closure(tmp_path_factory: pytest.TempPathFactory) -> NixClosure:
    return make_closure(tmp_path_factory.mktemp("nix"))


@pytest.fixture
def store(tmp_path: Path) -> CopiedStore:
    return CopiedStore(f"lmdb://{tmp_path}/store")
