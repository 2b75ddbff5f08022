"""What commands on services have in common: opening them, and printing."""

import argparse
import sys
from typing import TYPE_CHECKING

from appliance.cli.options import service_addresses
from appliance.cli.terminal import writing_output

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from appliance.services.contracts import Services


def with_services(
    options: argparse.Namespace, work: "Callable[[Services], Awaitable[None]]"
) -> None:
    """Do `work` with the services that `options` name, open for reading."""
    import asyncio  # takes longer to import than some commands to run

    from appliance.services.open_services import open_services

    async def run() -> None:
        async with open_services(service_addresses(options), is_readonly=True) as services:
            await work(services)

    asyncio.run(run())


def print_json(value: object, indent: int | None = None) -> None:
    """Print `value` to stdout."""
    import json

    write(json.dumps(value, indent=indent).encode() + b"\n")


def write_line(text: str) -> None:
    """Print a line; names in it are bytes, of UTF-8 or not, whatever the locale has."""
    write(text.encode("utf-8", "surrogateescape") + b"\n")


def write(data: bytes | memoryview) -> None:
    """Print bytes."""
    with writing_output():
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
