"""The listeners that come and go while the supervisor runs: `appliance attach` and `detach`."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from appliance.bounds import ATTACHED_MAX
from appliance.errors import ApplianceError, ConfigError, StoreError
from appliance.supervisor.attachments import Attachment, AttachmentFile, check_attached_name
from appliance.supervisor.listeners import Listener
from appliance.supervisor.open_exports import OpenExports

_LOG = logging.getLogger(__name__)


class AttachedListeners:
    """Attaches and detaches names, one at a time, and keeps them for the next supervisor.

    Args:
        state_dir: where the file of names is.
        listen_dir: where the sockets are of names that are attached without a path.
        exports: opens what a name exports.
        serve: begins to serve a listener, which it owns from then on.
        end: ends all sessions of a listener, closes it and removes its socket.
    """

    def __init__(
        self,
        state_dir: Path,
        listen_dir: Path,
        exports: OpenExports,
        serve: Callable[[Listener], None],
        end: Callable[[Path], Awaitable[None]],
    ) -> None:
        self._file = AttachmentFile(state_dir)
        self._listen_dir = listen_dir
        self._exports = exports
        self._serve = serve
        self._end = end
        self._attached: dict[str, Attachment] = {}
        self._errors: dict[str, str] = {}  # of names that cannot be served, with the reason
        self._changing = asyncio.Lock()
        self._are_changes_due = asyncio.Event()

    async def restore(self) -> None:
        """Listen on the sockets of the names that a former supervisor had.

        One that cannot be served, because its view is gone for example, is logged and stays
        attached.

        Raises:
            StoreError: the file of names breaks a rule.
        """
        async with self._changing:
            for attachment in self._file.read():
                self._attached[attachment.name] = attachment
                try:
                    await self._listen(attachment)
                except ApplianceError as exc:
                    self._errors[attachment.name] = str(exc)
                    _LOG.error("%s: is attached, but cannot be served: %s", attachment.name, exc)

    def begin_changes(self) -> None:
        """Carry out requests from now on; those that came earlier have waited."""
        self._are_changes_due.set()

    async def handle(self, request: Mapping[str, Any]) -> dict[str, object]:
        """Carry out a request of `control_socket`, and return the answer.

        Raises:
            ApplianceError: it cannot be carried out; nothing was changed.
            KeyError, TypeError, ValueError: it is no request.
        """
        await self._are_changes_due.wait()
        if "attach" in request:
            return await self._attach(request["attach"])
        return await self._detach(check_attached_name(request["detach"]))

    def report(self) -> list[dict[str, object]]:
        """Return what `appliance status` shows of the names that are attached."""
        return [
            {
                "name": name,
                "socket": str(attachment.socket),
                **({"error": self._errors[name]} if name in self._errors else {}),
            }
            for name, attachment in sorted(self._attached.items())
        ]

    async def _attach(self, row: Mapping[str, Any]) -> dict[str, object]:
        path = row["socket"] or self._listen_dir / f"{row['name']}.sock"
        wanted = Attachment.from_json({**row, "socket": path})
        answer: dict[str, object] = {"socket": str(wanted.socket)}
        async with self._changing:
            known = self._attached.get(wanted.name)
            if known == wanted and wanted.name not in self._errors:
                return answer
            if known is not None and known != wanted:
                raise ConfigError(
                    f"{wanted.name}: is attached already, at {known.socket} or with other options; "
                    "detach it first"
                )
            if known is None and len(self._attached) >= ATTACHED_MAX:
                raise ConfigError(f"{wanted.name}: {ATTACHED_MAX} names are attached already")
            await self._listen(wanted, is_kept_first=True)
        return answer

    async def _listen(self, attachment: Attachment, *, is_kept_first: bool = False) -> None:
        await self._exports.open(attachment.exported)
        try:
            listener = Listener.bind(
                attachment.socket,
                attachment.gid,
                mode=attachment.mode,
                exported=attachment.exported,
                profiling=attachment.profiling,
            )
            if is_kept_first:
                self._keep({**self._attached, attachment.name: attachment}, listener)
        except BaseException:
            self._exports.release(attachment.exported)
            raise
        self._errors.pop(attachment.name, None)
        self._serve(listener)

    def _keep(self, attached: dict[str, Attachment], listener: Listener) -> None:
        try:
            self._file.write(attached.values())
        except BaseException:
            listener.close()
            raise
        self._attached = attached

    async def _detach(self, name: str) -> dict[str, object]:
        async with self._changing:
            attachment = self._attached.get(name)
            if attachment is None:
                raise StoreError(f"{name}: is not attached")
            # If this process ends here, the name is still attached, so no session is left behind.
            if name not in self._errors:
                await self._end(attachment.socket)
                self._exports.release(attachment.exported)
                self._errors[name] = "it is being detached"
            self._file.write(other for other in self._attached.values() if other.name != name)
            del self._attached[name], self._errors[name]
        return {"socket": str(attachment.socket)}
