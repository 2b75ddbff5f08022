"""`appliance copy --to`: closures from one store into another, as they are kept."""

import argparse
import gc
from contextlib import contextmanager
from typing import TYPE_CHECKING

from appliance.cli.copy_report import MEGABYTE, CopyReport
from appliance.cli.options import progress_form
from appliance.cli.terminal import ProgressLine, progress_line
from appliance.errors import ApplianceError, ReadOnlyStoreError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from appliance.nix.store_path import StorePath
    from appliance.services.addresses import ServiceAddresses
    from appliance.store.writer import AsyncStore


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
        report = _StoreReport(line, is_json=options.json)
        uvloop.run(_copy(source, target, paths, stores, hold, report))
    report.end()


async def _copy(
    source: "ServiceAddresses",
    target: "ServiceAddresses",
    paths: "Sequence[StorePath]",
    stores: "dict[Path, AsyncStore]",
    hold: "Callable[[StorePath], None]",
    report: "_StoreReport",
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


class _StoreReport(CopyReport):
    """What is printed of a copy.

    Attributes:
        progress: totals so far.
    """

    def __init__(self, line: ProgressLine, *, is_json: bool) -> None:
        from appliance.copier.store_copy import StoreProgress

        super().__init__(line, is_json=is_json)
        self.progress: StoreProgress = StoreProgress()

    def show(self, num_done: int, num_all: int) -> None:
        progress = self.progress
        skipped = (
            f"skipped {progress.num_files_skipped} files, "
            f"{progress.num_bytes_skipped / MEGABYTE:.1f} MB"
        )
        self.line.update(
            num_files=progress.num_files - progress.num_files_skipped,
            num_bytes=progress.num_bytes - progress.num_bytes_skipped,
            path=f"{num_done}/{num_all} ({skipped}) {progress.path}",
            fraction=progress.fraction(),
        )

    def end(self) -> None:
        """Print the totals; see `CopyReport.conclude`."""
        progress = self.progress
        crossed = progress.num_bytes - progress.num_bytes_skipped
        num_files = progress.num_files - progress.num_files_skipped
        self.conclude(
            f"{self.num_copied} paths: {num_files} files, {self.megabytes_in_time(crossed)}; "
            f"{progress.num_files_skipped} files, "
            f"{progress.num_bytes_skipped / MEGABYTE:.1f} MB of theirs and "
            f"{self.num_present} paths were there already"
        )
