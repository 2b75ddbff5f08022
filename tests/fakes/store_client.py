"""A client in a process of its own: `python -m tests.fakes.store_client URI COMMAND SIZE`.

Prints the digest of what it put or read, and the most memory it ever used.
"""

import asyncio
import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import NamedTuple

from appliance.castore.digest import Digest
from appliance.castore.directory import Directory, DirectoryNode, FileNode
from appliance.services.addresses import ServiceAddresses, parse_service_uri
from appliance.services.contracts import Services
from appliance.services.open_services import open_services
from tests.fakes.running_command import memory_bytes

PIECE_SIZE = 1 << 20
_FANOUT = 50


class Outcome(NamedTuple):
    digest: Digest
    memory_bytes: int


def run_client(uri: str, command: str, argument: str, deadline_s: float = 900) -> Outcome:
    """Run one command to its end."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.fakes.store_client", uri, command, argument],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        timeout=deadline_s,
    )
    digest, memory = done.stdout.split()
    return Outcome(Digest(bytes.fromhex(digest)), int(memory))


def pieces_of(size: int) -> Iterator[bytes]:
    """Yield content of `size` bytes, no piece like another."""
    for number in range(-(-size // PIECE_SIZE)):
        seed = hashlib.sha256(number.to_bytes(8, "little")).digest()
        yield (seed * (PIECE_SIZE // len(seed)))[: size - number * PIECE_SIZE]


def closure_of(num_directories: int) -> Iterator[Directory]:
    """Yield a closure of so many directories, leaves first: a chain, each link with many leaves."""
    number = 0
    below: list[DirectoryNode] = []
    while number < num_directories:
        children = below
        while len(children) < _FANOUT and number < num_directories - 1:
            leaf = Directory(files=_files(b"%08d" % number))
            children.append(DirectoryNode(b"%08d" % number, leaf.digest(), leaf.size()))
            number += 1
            yield leaf
        link = Directory(children)
        below = [DirectoryNode(b"%08d" % number, link.digest(), link.size())]
        number += 1
        yield link


def _files(name: bytes) -> list[FileNode]:
    return [
        FileNode(b"%s-%03d" % (name, index), Digest(bytes(32)), index, executable=False)
        for index in range(3)
    ]


async def _put(services: Services, size: int) -> Digest:
    writer = await services.blobs.open_write()
    for piece in pieces_of(size):
        await writer.write(piece)
    return await writer.close()


async def _read(services: Services, digest: Digest) -> Digest:
    reader = await services.blobs.open_read(digest)
    assert reader is not None
    while await reader.read(PIECE_SIZE):
        pass
    await reader.close()
    return digest


async def _put_closure(services: Services, num_directories: int) -> Digest:
    putter = services.directories.put_multiple_start()
    for directory in closure_of(num_directories):
        await putter.put(directory)
    return await putter.close()


async def _get_closure(services: Services, digest: Digest) -> Digest:
    async for _directory in services.directories.get_recursive(digest):
        pass
    return digest


async def _main(uri: str, command: str, argument: str) -> Digest:
    address = parse_service_uri(uri)
    async with open_services(ServiceAddresses(address, address, address)) as services:
        match command:
            case "put":
                return await _put(services, int(argument))
            case "put-closure":
                return await _put_closure(services, int(argument))
            case "read":
                return await _read(services, Digest(bytes.fromhex(argument)))
            case _:
                return await _get_closure(services, Digest(bytes.fromhex(argument)))


if __name__ == "__main__":
    _, _uri, _command, _argument = sys.argv
    print(asyncio.run(_main(_uri, _command, _argument)).hex(), memory_bytes(os.getpid(), "VmHWM"))
