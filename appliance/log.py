"""Logging set-up: one line per event on stderr, plain or JSON."""

import json
import logging
import os
import sys


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        event = {
            "time": self.formatTime(record),
            "level": record.levelname,
            "logger": record.name,
            "pid": record.process,
            "message": record.getMessage(),
        }
        if record.exc_info:
            event["exception"] = self.formatException(record.exc_info)
        return json.dumps(event)


def configure_logging(level: str, *, is_json: bool) -> None:
    """Send log records of `level` and above to stderr, replacing any earlier set-up.

    To be called before gRPC is loaded, for it to keep its own remarks, which take neither form, to
    itself unless `GRPC_VERBOSITY` asks for them.
    """
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    handler = logging.StreamHandler(sys.stderr)
    if is_json:
        handler.setFormatter(_JsonFormatter())
    else:
        handler.setFormatter(logging.Formatter("%(levelname)s %(name)s[%(process)d]: %(message)s"))
    logging.basicConfig(level=level, handlers=[handler], force=True)
