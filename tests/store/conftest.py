"""A guest with an empty store."""

from tests.fs.conftest import guest as guest  # noqa: PLC0414 - a fixture, exported
