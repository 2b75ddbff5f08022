"""Opens of a mount with passthrough are answered, whatever becomes of their content."""

import asyncio

import pytest

from appliance.errors import ContentMissingError
from appliance.resolve.backings import Backings
from appliance.session.wants import BackingWanted, BlobWanted

WANT = BackingWanted(2, 1, bytes(32), 5)


@pytest.mark.parametrize("error", [ContentMissingError("gone"), OSError(5, "broken")])
def test_content_that_cannot_be_had_has_no_backing_file(error: Exception) -> None:
    num_tries = 0

    async def fail(_want: BlobWanted) -> int | None:
        nonlocal num_tries
        num_tries += 1
        raise error

    async def main() -> None:
        backings = Backings(-1, fail)
        for _ in range(2):
            taken = await asyncio.gather(backings.take(WANT), backings.take(WANT))
            assert [*taken] == [0, 0]
            backings.release(WANT.nodeid)
            backings.release(WANT.nodeid)

    asyncio.run(main())
    assert num_tries == 2
