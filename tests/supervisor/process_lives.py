"""Which processes a supervisor has, what they hold, and the end of them."""

from pathlib import Path

from appliance.store.leases import living_leases
from appliance.store.root_lists import roots_locked
from tests.fakes.appliance_process import ApplianceProcess
from tests.fakes.hostile_guest import descendants, parent_of
from tests.fakes.running_command import DEADLINE_S, every_event


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def await_end(pids: set[int]) -> None:
    for _ in every_event(DEADLINE_S):
        if not any(map(is_running, pids)):
            return
    raise AssertionError(f"of {pids}, some still run")


def fork_servers_of(appliance: ApplianceProcess) -> set[int]:
    pid = appliance.process.pid
    return {child for child in descendants(pid) if parent_of(child) == pid}


def processes_of(appliance: ApplianceProcess) -> set[int]:
    """Return the session processes and workers that it lists."""
    return {
        pid
        for session in appliance.status()
        for pid in (session["pid"], *(worker["pid"] for worker in session["workers"]))
    }


def session_leases(store: Path) -> list[int]:
    """Return how many paths each living lease of a session holds."""
    with roots_locked(store, is_exclusive=True):
        return [len(lease.paths) for lease in living_leases(store) if lease.kind == "session"]
