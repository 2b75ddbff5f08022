"""Everything below vm-tests boots a guest or builds what goes into one."""

import os
from collections.abc import Iterable
from pathlib import Path

import pytest

HERE = Path(__file__).parent
# What a host is configured to is no part of a test.
os.environ["APPLIANCE_CONFIG"] = os.devnull


def pytest_collection_modifyitems(items: Iterable[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.vm)
