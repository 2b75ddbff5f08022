"""A real `appliance daemon` process."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.fakes.running_command import APPLIANCE, RunningCommand


class DaemonProcess(RunningCommand):
    """`appliance daemon` on a store, up when the constructor returns.

    It listens on a socket in `directory` and on a free TCP port, and wherever `listen` says.
    """

    def __init__(
        self,
        store: str,
        directory: Path,
        *,
        listen: Sequence[str] = (),
        options: Sequence[str] = (),
        prefix: Sequence[str] = (),
        environ: Mapping[str, str] | None = None,
        pass_fds: Sequence[int] = (),
    ) -> None:
        directory.mkdir(exist_ok=True)
        self.socket = directory / "daemon.sock"
        log_path = directory / "daemon.log"
        log_path.unlink(missing_ok=True)
        listening = [f"--listen-address={where}" for where in (self.socket, "[::1]:0", *listen)]
        super().__init__(
            [*prefix, *APPLIANCE, "daemon", "--store", store, *listening, *options],
            log_path,
            environ=environ,
            pass_fds=pass_fds,
        )
        match = re.search(r"(\[::1\]:\d+)", self.log())
        assert match, self.log()
        self.tcp = match[1]

    @property
    def unix_uri(self) -> str:
        return f"grpc+unix://{self.socket}"

    @property
    def tcp_uri(self) -> str:
        return f"grpc+http://{self.tcp}"
