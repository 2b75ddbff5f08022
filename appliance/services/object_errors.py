"""What the errors of object stores mean.

The library tells a few kinds apart; everything else is in its texts, which quote the HTTP status
and the answer of the server. An answer in XML (S3, Google, Azure) has a code and a message.
"""

import re
from typing import Final

from obstore.exceptions import (
    NotSupportedError,
    PermissionDeniedError,
    UnauthenticatedError,
)

from appliance.errors import (
    ApplianceError,
    ReadOnlyStoreError,
    ServiceUnavailableError,
    StoreError,
    StoreFullError,
)

# What follows is for the developers of the library.
_DEBUG_PART: Final = "\n\nDebug source:"
# Characters of an error that are passed on.
_TEXT_MAX: Final = 300
_STATUS: Final = re.compile(r"status code: (\d{3})[^:]*")
_CODE: Final = re.compile(r"<Code>([^<]*)</Code>")
_MESSAGE: Final = re.compile(r"<Message>([^<]*)</Message>")
_OS_ERROR: Final = re.compile(r"([^:]*) \(os error (\d+)\)")
_FULL_OS_ERRORS: Final = frozenset({"28", "122"})  # ENOSPC, EDQUOT
_REFUSED_OS_ERRORS: Final = frozenset({"1", "13", "30"})  # EPERM, EACCES, EROFS
# Statuses below 500 after which the same request may succeed.
_WORTH_ANOTHER_TRY: Final = frozenset({408, 425, 429})
# Where virtual machines of clouds ask for credentials.
_METADATA_SERVER: Final = ("169.254.169.254", "169.254.170.2", "metadata.google.internal")


def error_of_store(exc: BaseException, name: str, what: str) -> ApplianceError:
    """Return the error to raise for `exc`, an error of the library.

    Args:
        exc: the error.
        name: the store, for messages.
        what: the object, or what was done.
    """
    text = str(exc).partition(_DEBUG_PART)[0]
    where = f"{name}: {what}"
    on_disk = _OS_ERROR.search(text)
    if on_disk is not None:
        reason, number = on_disk[1].strip(), on_disk[2]
        if number in _FULL_OS_ERRORS:
            return StoreFullError(f"{where}: {reason}")
        if number in _REFUSED_OS_ERRORS:
            return ReadOnlyStoreError(f"{where}: {reason}")
        if _STATUS.search(text) is None and "://" not in text:
            return StoreError(f"{where}: {reason}")
    if any(server in text for server in _METADATA_SERVER):
        return StoreError(f"{name}: no credentials are given, and this host has none of its own")
    reason = _reason(text)
    status = _STATUS.search(text)
    if isinstance(exc, PermissionDeniedError | UnauthenticatedError | NotSupportedError):
        return StoreError(f"{where}: {reason}")
    if isinstance(exc, NotImplementedError):
        return StoreError(f"{where}: this kind of store cannot do that")
    number = int(status[1]) if status is not None else 0
    if 400 <= number < 500 and number not in _WORTH_ANOTHER_TRY:
        return StoreError(f"{where}: {reason}")
    return ServiceUnavailableError(f"{where}: {reason}")


def has_answered(exc: BaseException) -> bool:
    """Return whether `exc` is an answer of the server, even if only that it is busy."""
    return _STATUS.search(str(exc)) is not None


def is_no_bucket(exc: BaseException) -> bool:
    """Return whether `exc` says that not only the object is missing, but the whole bucket."""
    text = str(exc)
    return "NoSuchBucket" in text or "ContainerNotFound" in text


def _reason(text: str) -> str:
    status = _STATUS.search(text)
    code, message = _CODE.search(text), _MESSAGE.search(text)
    if code is not None:
        parts = [status[0].removeprefix("status code: ").strip() if status else "", code[1]]
        words = " ".join(part for part in parts if part)
        reason = f"{words}: {message[1]}" if message and message[1] else words
    else:
        # In front of the last dash are the request and how long it took.
        reason = text.rpartition(" - ")[2] or text
        reason = reason.removeprefix("Server returned non-2xx status code: ").rstrip(": ")
    return " ".join(reason.split())[:_TEXT_MAX]
