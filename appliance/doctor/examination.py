"""All checks, in the order in which they are shown."""

from collections.abc import Collection, Iterable
from pathlib import Path

from appliance.doctor.findings import Finding, Use, Verdict
from appliance.doctor.fuse_checks import fuse_checks
from appliance.doctor.guest_checks import guest_checks
from appliance.doctor.kernel_checks import kernel_checks
from appliance.doctor.limit_checks import limit_checks
from appliance.doctor.store_checks import store_checks


def examine(uses: Collection[Use], store: Path | None, sockets: Iterable[Path]) -> list[Finding]:
    """Return the findings that matter for at least one of `uses`.

    The process must not have threads yet, because the checks fork.

    Args:
        uses: what this host is to be used for.
        store: the directory of the local store, or None if all services are elsewhere.
        sockets: vhost-user sockets whose rights are checked.
    """
    found = [*kernel_checks(), *limit_checks()]
    if Use.MOUNT in uses:
        found += fuse_checks()
    if store is not None:
        found += store_checks(store)
    found += guest_checks(sockets)
    return [finding for finding in found if finding.uses.intersection(uses)]


def unusable(findings: Iterable[Finding], uses: Iterable[Use]) -> list[Use]:
    """Return those of `uses` that do not work here."""
    lacking = [finding.uses for finding in findings if finding.verdict is Verdict.LACKING]
    return [use for use in uses if any(use in each for each in lacking)]
