"""What `appliance copy` prints of the paths that it copies, whatever the way it copies them."""

import sys
import time
from typing import TYPE_CHECKING, Final

from appliance.cli.output import print_json, write_line
from appliance.cli.terminal import ProgressLine

if TYPE_CHECKING:
    from appliance.copier.copier import CopyOutcome
    from appliance.errors import ApplianceError

MEGABYTE: Final = 1_000_000


class CopyReport:
    """The outcomes of a copy, each printed as it comes, and their number.

    Attributes:
        line: where the progress is shown.
        cause: why the copy ended early, if it did.
        num_copied: of the paths that were not there.
        num_present: of those that were.
        num_bytes: of the NARs of what was copied.
    """

    def __init__(self, line: ProgressLine, *, is_json: bool) -> None:
        self.line = line
        self.cause: ApplianceError | None = None
        self.num_copied = self.num_present = self.num_bytes = 0
        self._is_json = is_json
        self._started_s = time.monotonic()
        self._refused: list[str] = []

    def take(self, outcome: "CopyOutcome") -> None:
        """Count an outcome, and print it; without JSON, only of what was copied."""
        from appliance.copier.copier import CopyStatus

        path = outcome.path.absolute()
        match outcome.status:
            case CopyStatus.REFUSED:
                self._refused.append(outcome.reason)
            case CopyStatus.PRESENT:
                self.num_present += 1
            case CopyStatus.COPIED:
                self.num_copied += 1
                self.num_bytes += outcome.nar_size
        self.line.clear()
        if self._is_json:
            printed: dict[str, object] = {"path": path, "status": outcome.status.value}
            if outcome.status is CopyStatus.COPIED:
                printed["narSize"] = outcome.nar_size
            if outcome.reason:
                printed["error"] = outcome.reason
            print_json(printed)
        elif outcome.status is CopyStatus.COPIED:
            write_line(path)

    def megabytes_in_time(self, num_bytes: int) -> str:
        """Return a number of bytes, the time that the copy has taken, and the speed, as a text."""
        elapsed_s = time.monotonic() - self._started_s
        speed = num_bytes / MEGABYTE / max(elapsed_s, 1e-3)
        return f"{num_bytes / MEGABYTE:.1f} MB in {elapsed_s:.1f} s ({speed:.0f} MB/s)"

    def conclude(self, totals: str) -> None:
        """Print the totals, unless the output is JSON.

        Raises:
            StoreError: some paths were refused: one line for each; or the copy ended early.
        """
        from appliance.copier.copier import failure_text

        if not self._is_json:
            print(f"copied {totals}, {len(self._refused)} were refused", file=sys.stderr)
        if self._refused or self.cause is not None:
            raise failure_text(self._refused, self.cause) from self.cause
