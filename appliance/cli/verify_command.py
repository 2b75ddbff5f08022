"""`appliance verify`: read and check what is stored, and mark or repair what is damaged."""

import argparse
import sys
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from appliance.cli.key_options import add_trusted_keys_option
from appliance.cli.options import (
    add_json_option,
    add_log_options,
    add_service_options,
    add_state_option,
    progress_form,
    service_addresses,
    state_dir,
)
from appliance.cli.output import print_json, write_line
from appliance.cli.terminal import progress_line
from appliance.errors import ConfigError, ReadOnlyStoreError, StoreError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from appliance.cli.terminal import ProgressLine
    from appliance.nix.store_path import StorePath
    from appliance.nix.trusted_keys import TrustedKeys
    from appliance.services.addresses import ServiceAddresses
    from appliance.services.checked_contents import VerifyProgress
    from appliance.services.contracts import Services
    from appliance.services.repair import Repairer, Source
    from appliance.services.verify import Verifier
    from appliance.services.verify_errors import VerifyError
    from appliance.store.writer import AsyncStore

    Subparsers = argparse._SubParsersAction[Any]  # noqa: SLF001 - has no other name

_PROGRESS_INTERVAL_S: Final = 0.1
_CACHE_DIRECTORY: Final = "cache"


def add_verify(commands: "Subparsers") -> None:
    """Add the command."""
    command = commands.add_parser(
        "verify",
        usage="%(prog)s [OPTION]... [PATH]...",
        help="read and check the contents of store paths, and repair them",
        description="Read all contents of each PATH, or of all store paths if no PATH is given, "
        "and report each content, NAR and content address that is wrong. What is damaged in a "
        "store on this machine is marked, and is replaced when it is put again.",
    )
    command.add_argument(
        "paths", nargs="*", metavar="PATH", help="a store path, with or without /nix/store/"
    )
    command.add_argument(
        "--closure", action="store_true", help="also verify all store paths that PATHs refer to"
    )
    add_trusted_keys_option(
        command,
        "also report each path that has neither a content address nor a signature by one of these "
        "keys, NAME:BASE64, separated by spaces, and each wrong signature by one of them",
    )
    add_json_option(command)
    add_state_option(command, "if no PATH is given, also verify the cache of remote blobs in DIR")
    repair = command.add_argument_group("repair")
    repair.add_argument(
        "--repair",
        action="store_true",
        help="replace what is damaged, and verify the replacement",
    )
    repair.add_argument(
        "--from",
        dest="source",
        metavar="URI|TREE",
        help="take contents for --repair from the store at the address URI, or from a directory "
        "with the same files",
    )
    add_service_options(command)
    add_log_options(command)
    command.set_defaults(run=_run_verify)


def _run_verify(options: argparse.Namespace) -> None:
    import asyncio

    from appliance.nix.trusted_keys import parse_keys
    from appliance.services.paths_in_store import parse_path

    keys = options.trusted_public_keys
    trusted_keys = parse_keys(keys, "--trusted-public-keys") if keys else None
    if options.source is not None and not options.repair:
        raise ConfigError("--from: expected --repair, too")
    paths = [parse_path(text)[0] for text in options.paths]
    addresses = service_addresses(options)
    source = None if options.source is None else _source_of(options.source)
    cache = None if paths else state_dir(options, addresses) / _CACHE_DIRECTORY
    with progress_line(progress_form(options)) as line:
        what = _What(addresses, paths, trusted_keys, takes_closures=options.closure)
        run = _Run(what, line, is_json=options.json)
        asyncio.run(run.run(source, cache, is_repairing=options.repair))


def _source_of(text: str) -> "ServiceAddresses | Path":
    from appliance.services.addresses import ServiceAddresses, parse_service_uri

    path = Path(text)
    if text and path.exists():
        return path
    try:
        address = parse_service_uri(text)
    except ConfigError as exc:
        raise ConfigError(f"--from {text}: no such directory, and no address: {exc}") from exc
    return ServiceAddresses(address, address, address)


class _What(NamedTuple):
    """What is verified.

    Args:
        addresses: the services.
        paths: the store paths; empty for all.
        trusted_keys: whose signatures are required, if any are.
        takes_closures: whether to verify the references of the paths, too.
    """

    addresses: "ServiceAddresses"
    paths: "Sequence[StorePath]"
    trusted_keys: "TrustedKeys | None"
    takes_closures: bool


class _Run:
    """One run of the command.

    Args:
        what: what is verified.
        line: shows the progress.
        is_json: whether problems are printed as JSON, all at the end.
    """

    def __init__(self, what: _What, line: "ProgressLine", *, is_json: bool) -> None:
        self._takes_closures = what.takes_closures
        self._addresses = what.addresses
        self._paths = what.paths
        self._trusted_keys = what.trusted_keys
        self._line = line
        self._is_json = is_json
        self._problems: list[str] = []
        self._num_repaired = 0
        self._num_bad_derived = 0
        self._stack = AsyncExitStack()

    async def run(
        self,
        source: "ServiceAddresses | Path | None",
        cache: Path | None,
        *,
        is_repairing: bool,
    ) -> None:
        """Verify, mark what is damaged, and repair it if `is_repairing`.

        Args:
            source: where a repair takes contents from, beside the services themselves.
            cache: directory of the cache of remote blobs to verify, if any.
            is_repairing: whether to repair.

        Raises:
            StoreError: something is damaged, and was not repaired.
        """
        from appliance.services.open_services import open_services

        async with self._stack:
            stores = self._open_stores(is_repairing=is_repairing)
            services = await self._stack.enter_async_context(
                open_services(self._addresses, is_readonly=True, stores=stores)
            )
            repairer = await self._repairer(stores, source)
            first = last = await self._verify(services, self._paths)
            await repairer.mark(last.damaged.values())
            # What is below a damaged directory is found only once the directory is repaired.
            while is_repairing and await self._repair(repairer, last):
                last = await self._verify(services, last.failed)
                await repairer.mark(last.damaged.values())
            if not self._paths:
                self._check_images(stores, is_repairing=is_repairing)
            if cache is not None:
                self._check_cache(cache, is_repairing=is_repairing)
        num_failed = last.num_failed + self._num_bad_derived
        counts = {
            "paths": first.num_paths,
            "bytes": first.progress.num_bytes,
            "failures": num_failed,
        }
        if is_repairing:
            counts["repaired"] = self._num_repaired
        self._conclude(counts)

    def _conclude(self, counts: dict[str, int]) -> None:
        summary = ", ".join(f"{name}: {count}" for name, count in counts.items())
        if self._is_json:
            print_json({**counts, "problems": self._problems})
        elif not counts["failures"]:
            write_line(summary)
        if counts["failures"]:
            raise StoreError(summary)

    def _open_stores(self, *, is_repairing: bool) -> "dict[Path, AsyncStore]":
        from appliance.services.addresses import LmdbAddress
        from appliance.store.writer import AsyncStore

        stores: dict[Path, AsyncStore] = {}
        for address in self._addresses:
            if isinstance(address, LmdbAddress) and (path := address.path.resolve()) not in stores:
                stores[path] = AsyncStore.open(path, or_readonly=True)
                self._stack.callback(stores[path].close)
                if is_repairing and not stores[path].store.is_writable:
                    raise ReadOnlyStoreError(
                        f"{path}: --repair: this user may not write to the store"
                    )
        return stores

    async def _repairer(
        self, stores: "dict[Path, AsyncStore]", source: "ServiceAddresses | Path | None"
    ) -> "Repairer":
        from appliance.services.addresses import LmdbAddress, ServiceAddress
        from appliance.services.open_services import open_services
        from appliance.services.repair import LocalStores, Repairer, ServiceSource, TreeSource

        def store_at(address: ServiceAddress) -> "AsyncStore | None":
            store = stores[address.path.resolve()] if isinstance(address, LmdbAddress) else None
            return store if store is not None and store.store.is_writable else None

        opened: Source | None = None
        if isinstance(source, Path):
            opened = TreeSource(source)
        elif source is not None:
            services = await self._stack.enter_async_context(
                open_services(source, is_readonly=True, stores=stores)
            )
            opened = ServiceSource(services)
        local = LocalStores(store_at(self._addresses.blobs), store_at(self._addresses.directories))
        return Repairer(local, opened)

    async def _verify(self, services: "Services", paths: "Sequence[StorePath]") -> "Verifier":
        import asyncio

        from appliance.services.verify import Verifier

        verifier = Verifier(services, self._report, self._trusted_keys)
        showing = asyncio.create_task(_show_progress(self._line, verifier.progress))
        try:
            if self._takes_closures:
                await verifier.verify_closure(paths)
            elif paths:
                for path in paths:
                    await verifier.verify(path)
            else:
                await verifier.verify_all()
        finally:
            showing.cancel()
            self._line.clear()
        return verifier

    async def _repair(self, repairer: "Repairer", verifier: "Verifier") -> bool:
        num_repaired = 0
        for node in verifier.damaged.values():
            if await repairer.repair(node):
                num_repaired += 1
        self._num_repaired += num_repaired
        return num_repaired > 0

    def _check_images(self, stores: "dict[Path, AsyncStore]", *, is_repairing: bool) -> None:
        from appliance.store.damage import drop_image, wrong_images

        for path, opened in stores.items():
            for digest in wrong_images(opened.store):
                problem = f"{path}: image of directory {digest}: does not match the directory"
                if opened.store.is_writable:
                    drop_image(opened.store, digest)
                    problem += ", and was removed"
                self._say(problem)
                if is_repairing:
                    self._num_repaired += 1
                else:
                    self._num_bad_derived += 1

    def _check_cache(self, path: Path, *, is_repairing: bool) -> None:
        from appliance.db.environment import NotWritableError
        from appliance.store.blob_cache import BlobCache, has_cache

        if not has_cache(path):
            return
        try:
            cache = BlobCache(path, sys.maxsize)  # so that nothing is evicted
        except NotWritableError:
            return
        try:
            for digest in cache.drop_damaged():
                self._say(f"{path}: blob {digest}: the content had another digest, and was removed")
                if is_repairing:
                    self._num_repaired += 1
                else:
                    self._num_bad_derived += 1
        finally:
            cache.close()

    def _report(self, error: "VerifyError") -> None:
        self._say(str(error))

    def _say(self, problem: str) -> None:
        # A problem that could not be repaired is found again when the repair is verified.
        if problem in self._problems:
            return
        self._problems.append(problem)
        if not self._is_json:
            self._line.clear()
            print(f"appliance: {problem}", file=sys.stderr)


async def _show_progress(line: "ProgressLine", progress: "VerifyProgress") -> None:
    import asyncio

    while True:
        line.update(
            num_files=progress.num_files,
            num_bytes=progress.num_bytes,
            path=progress.path,
            fraction=progress.fraction(),
        )
        await asyncio.sleep(_PROGRESS_INTERVAL_S)
