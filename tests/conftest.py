"""The order of the suite: what is quick and likely to fail first, guests last.

With several processes (pytest-xdist, a file at a time) it is the other way round: what takes long
begins first, and the quick files fill the end.
"""

import compileall
import os
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

import pytest

from tests.fakes.s3_gateway import Gateway
from tests.fakes.s3_server import Moto, S3Server

# What a host is configured to is no part of a test.
os.environ["APPLIANCE_CONFIG"] = os.devnull


def pytest_configure(config: pytest.Config) -> None:
    # As where it is installed: programs that tests start compile nothing, even if what they import
    # must not be written (PYTHONDONTWRITEBYTECODE).
    if not hasattr(config, "workerinput"):
        compileall.compile_dir(str(files("appliance")), quiet=1)


def pytest_report_header() -> str:
    return f"plain requests are answered in: {os.environ.get('APPLIANCE_ANSWERS', 'c')}"


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    is_one_of_several = hasattr(config, "workerinput")
    items.sort(key=lambda item: (_has(item, "vm"), _has(item, "slow")), reverse=is_one_of_several)


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """Return a server that speaks S3, with the bucket `contracts`.

    It is moto's, or versitygw (`make other-s3`).
    """
    directory = tmp_path_factory.mktemp("s3")
    program = os.environ.get("TEST_S3_GATEWAY")
    with Gateway(Path(program), directory) if program else Moto(directory) as server:
        server.make_bucket("contracts")
        yield server


def _has(item: pytest.Item, marker: str) -> bool:
    return item.get_closest_marker(marker) is not None
