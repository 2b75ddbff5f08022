"""What commands that use services share: opening the services, and printing to standard output."""

import argparse
import sys
from typing import TYPE_CHECKING

from appliance.cli.options import service_addresses
from appliance.cli.terminal import writing_output

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from appliance.services.contracts import Services


def with_services(
    options: argparse.Namespace,
    work: "Callable[[Services], Awaitable[None]]",
    *,
    is_readonly: bool = True,
) -> None:
    """Open the services that `options` name, by default for reading, and run `work` with them."""
    import asyncio  # importing it takes longer than some commands run

    from appliance.services.open_services import open_services

    async def run() -> None:
        async with open_services(service_addresses(options), is_readonly=is_readonly) as services:
            await work(services)

    asyncio.run(run())


def print_json(value: object, indent: int | None = None) -> None:
    """Print `value` as JSON, in UTF-8; bytes of names that are not UTF-8 become escapes."""
    import json

    text = json.dumps(value, indent=indent, ensure_ascii=False)
    # A surrogate stands for a byte that is not UTF-8; `backslashreplace` escapes it as JSON does.
    write(text.encode("utf-8", "backslashreplace") + b"\n")


def write_line(text: str) -> None:
    """Print a line in UTF-8, whatever the locale; surrogates become the bytes they stand for."""
    write(text.encode("utf-8", "surrogateescape") + b"\n")


def write(data: bytes | memoryview) -> None:
    """Print `data` and flush.

    Raises:
        BrokenPipeError: the reader has closed its end.
        ApplianceError: standard output cannot be written.
    """
    with writing_output():
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
