"""What a supervisor tells the service manager while it runs, and its log when it is asked to.

The watchdog (`WatchdogSec=`) gets a sign of life as long as the event loop and the fork server
work: one that hangs could serve no front-end and replace no worker. The service manager then ends
the supervisor and starts another one, which takes the sessions over.
"""

import asyncio
import contextlib
import contextvars
import json
import logging
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, Final

from appliance.log import set_log_source
from appliance.supervisor.forker import Forker
from appliance.system.listening import announce_status, has_service_manager
from appliance.system.watchdog import feeding_watchdog

_LOG: Final = logging.getLogger(__name__)

# How often to look whether the status has changed.
_STATUS_EVERY_S: Final = 2.0
# In reports, for metrics only.
_HISTOGRAMS: Final = "histograms"


@contextlib.asynccontextmanager
async def giving_signs_of_life(
    sessions: Callable[[], dict[str, Any]],
    gather: Callable[[], Awaitable[dict[str, Any]]],
    forker: Forker,
) -> AsyncIterator[None]:
    """Tell the service manager how things are, and log that on SIGUSR1, for a block.

    Args:
        sessions: returns the sessions, and the front-ends that wait.
        gather: returns a whole report (see `figures`).
        forker: whose fork server must answer.
    """
    tasks: set[asyncio.Task[None]] = set()

    def spawn(work: "asyncio.Task[None]") -> None:
        tasks.add(work)
        work.add_done_callback(tasks.discard)

    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGUSR1, lambda: spawn(asyncio.create_task(_log_state(gather))))
    if has_service_manager():
        spawn(asyncio.create_task(_tell_status(sessions)))

    async def works(deadline_s: float) -> bool:
        answers = await forker.answers(deadline_s)
        if not answers:
            _LOG.error("the fork server does not answer; the watchdog gets no sign of life")
        return answers

    try:
        async with feeding_watchdog(works):
            yield
    finally:
        # A signal that comes now must not end the process before its sessions are closed.
        loop.add_signal_handler(signal.SIGUSR1, lambda: None)
        ended = list(tasks)
        for task in ended:
            task.cancel()
        await asyncio.gather(*ended, return_exceptions=True)


async def _tell_status(sessions: Callable[[], dict[str, Any]]) -> None:
    told = ""
    while True:
        text = _status_of(sessions())
        if text != told:
            announce_status(text)
            told = text
        await asyncio.sleep(_STATUS_EVERY_S)


def _status_of(report: Mapping[str, Any]) -> str:
    sessions = report["sessions"]
    workers = sum(len(session["workers"]) for session in sessions)
    text = f"{len(sessions)} served, by {workers} worker{'s' * (workers != 1)}"
    waiting = len(report.get("waiting", ()))
    return f"{text}; {waiting} front-ends wait" if waiting else text


async def _log_state(gather: Callable[[], Awaitable[dict[str, Any]]]) -> None:
    report = await gather()
    rest = {key: value for key, value in report.items() if key != "sessions"}
    _LOG.info("state: %s", json.dumps(rest))
    for session in report["sessions"]:
        # Each has a limit of log lines of its own.
        contextvars.copy_context().run(_log_session, session)


def _log_session(session: Mapping[str, Any]) -> None:
    label = session.get("socket") or session["mount"]
    set_log_source(label)
    state = {key: value for key, value in session.items() if key != _HISTOGRAMS}
    # Of the rest, `appliance status` has it in full.
    state["wants"] = {
        kind: wanted["outcomes"] for kind, wanted in session["wants"]["kinds"].items()
    }
    _LOG.info("state of %s: %s", label, json.dumps(state))
