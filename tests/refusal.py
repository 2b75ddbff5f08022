"""Expecting an error that names the rule that was broken."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from appliance.errors import ApplianceError


@contextmanager
def refused(
    kind: type[ApplianceError], rule: str, match: str | None = None
) -> Iterator[pytest.ExceptionInfo[ApplianceError]]:
    """Expect an error of exactly this class and rule, whose text matches the pattern `match`."""
    with pytest.raises(kind, match=match) as caught:
        yield caught
    assert type(caught.value) is kind
    assert caught.value.rule == rule
