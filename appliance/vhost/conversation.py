"""One front-end from its connection to its end."""

from appliance.vhost.session import Session
from appliance.vhost.transport import Connection


async def converse(connection: Connection, session: Session) -> None:
    """Handle requests until the front-end is gone; then close both, however it ended.

    The session is closed first: a front-end that sees its socket end may rely on its memory being
    left alone.

    Raises:
        VhostError: the front-end broke the protocol; not logged yet.
    """
    try:
        while (message := await connection.receive()) is not None:
            reply = await session.handle(message)
            if reply is not None:
                await connection.send(reply)
    finally:
        try:
            await session.close()
        finally:
            connection.close()
