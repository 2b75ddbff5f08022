"""`appliance copy --to`: closures from one store into another, as they are kept."""

import argparse
import gc
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from appliance.cli.options import progress_form
from appliance.cli.output import print_json, write_line
from appliance.cli.terminal import ProgressLine, progress_line
from appliance.errors import ApplianceError, ReadOnlyStoreError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from appliance.copier.copier import CopyOutcome
    from appliance.nix.store_path import StorePath
    from appliance.services.addresses import ServiceAddresses
    from appliance.store.writer import AsyncStore

_MEGABYTE: Final = 1_000_000


def copy_between(
    options: argparse.Namespace,
    source: "ServiceAddresses",
    target: "ServiceAddresses",
    paths: "Sequence[StorePath]",
) -> None:
    """Copy the closures of `paths`, and print the result for each path.

    Raises:
        StoreError: some paths were refused: one line for each; or the copy ended early.
    """
    import uvloop

    # What was loaded so far stays, so collections need not go through it.
    gc.freeze()
    with progress_line(progress_form(options)) as line, _held(target) as (stores, hold):
        report = _Report(line, is_json=options.json)
        uvloop.run(_copy(source, target, paths, stores, hold, report))
    report.conclude()


async def _copy(
    source: "ServiceAddresses",
    target: "ServiceAddresses",
    paths: "Sequence[StorePath]",
    stores: "dict[Path, AsyncStore]",
    hold: "Callable[[StorePath], None]",
    report: "_Report",
) -> None:
    from appliance.copier.store_copy import StoreCopy
    from appliance.services.open_services import open_services

    async with (
        open_services(target, stores=stores) as target_services,
        open_services(source, stores=stores, is_readonly=True) as source_services,
    ):
        copy = StoreCopy(
            source_services,
            target_services,
            progress=report.progress,
            hold=hold,
            when_waiting=report.show,
        )
        try:
            async for outcome in copy.run(paths):
                report.take(outcome)
        except BrokenPipeError:
            raise
        except ApplianceError as exc:
            report.cause = exc


@contextmanager
def _held(
    target: "ServiceAddresses",
) -> "Iterator[tuple[dict[Path, AsyncStore], Callable[[StorePath], None]]]":
    """Open the target if it is a store of this machine, and keep what is copied until the end."""
    from appliance.store.leases import Lease, LeaseKind
    from appliance.store.writer import AsyncStore

    path = target.one_store()
    if path is None:
        yield {}, lambda _path: None
        return
    store = AsyncStore.open(path, create=True, or_readonly=True)
    try:
        if not store.store.is_writable:
            raise ReadOnlyStoreError(f"{path}: cannot be written by this user")
        lease = Lease.begin(path, LeaseKind.IMPORT)

        def hold(held: "StorePath") -> None:
            lease.hold([held.basename().encode()])

        try:
            yield {path: store}, hold
        finally:
            lease.close()
    finally:
        store.close()


class _Report:
    """What is printed of a copy.

    Attributes:
        progress: totals so far.
        cause: why the copy ended early, if it did.
    """

    def __init__(self, line: ProgressLine, *, is_json: bool) -> None:
        from appliance.copier.store_copy import StoreProgress

        self.progress: StoreProgress = StoreProgress()
        self.cause: ApplianceError | None = None
        self._line = line
        self._is_json = is_json
        self._started_s = time.monotonic()
        self._refused: list[str] = []
        self._num_copied = self._num_present = 0

    def take(self, outcome: "CopyOutcome") -> None:
        from appliance.copier.copier import CopyStatus

        path = outcome.path.absolute()
        match outcome.status:
            case CopyStatus.REFUSED:
                self._refused.append(outcome.reason)
            case CopyStatus.PRESENT:
                self._num_present += 1
            case CopyStatus.COPIED:
                self._num_copied += 1
        self._line.clear()
        if self._is_json:
            printed: dict[str, object] = {"path": path, "status": outcome.status.value}
            if outcome.status is CopyStatus.COPIED:
                printed["narSize"] = outcome.nar_size
            if outcome.reason:
                printed["error"] = outcome.reason
            print_json(printed)
        elif outcome.status is CopyStatus.COPIED:
            write_line(path)

    def show(self, num_done: int, num_all: int) -> None:
        progress = self.progress
        skipped = (
            f"skipped {progress.num_files_skipped} files, "
            f"{progress.num_bytes_skipped / _MEGABYTE:.1f} MB"
        )
        self._line.update(
            num_files=progress.num_files - progress.num_files_skipped,
            num_bytes=progress.num_bytes - progress.num_bytes_skipped,
            path=f"{num_done}/{num_all} ({skipped}) {progress.path}",
            fraction=progress.fraction(),
        )

    def conclude(self) -> None:
        """Print the totals.

        Raises:
            StoreError: some paths were refused, or the copy ended early.
        """
        from appliance.copier.copier import failure_text

        progress = self.progress
        elapsed_s = time.monotonic() - self._started_s
        crossed = progress.num_bytes - progress.num_bytes_skipped
        if not self._is_json:
            num_files = progress.num_files - progress.num_files_skipped
            print(
                f"copied {self._num_copied} paths: {num_files} files, "
                f"{crossed / _MEGABYTE:.1f} MB in {elapsed_s:.1f} s "
                f"({crossed / _MEGABYTE / max(elapsed_s, 1e-3):.0f} MB/s); "
                f"{progress.num_files_skipped} files, "
                f"{progress.num_bytes_skipped / _MEGABYTE:.1f} MB of theirs and "
                f"{self._num_present} paths were there already, {len(self._refused)} were refused",
                file=sys.stderr,
            )
        if self._refused or self.cause is not None:
            raise failure_text(self._refused, self.cause) from self.cause
