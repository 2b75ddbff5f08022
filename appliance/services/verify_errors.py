"""What verification finds: one error for each thing that is not as its path or node says."""

from appliance.castore.directory import DirectoryNode, FileNode
from appliance.errors import StoreError


class VerifyError(StoreError):
    """Something stored is not what its path or node says.

    The text is one line that begins with the place. `rule` is one of:

    - `invalid-path`: a path is not in the store;
    - `missing-reference`: a path refers to one that is not in the store;
    - `unreadable`: the store cannot give what it has;
    - `unworkable`: the tree is too large for its NAR to be made;
    - `content-mismatch`: a blob or directory is not there, or has another digest;
    - `size-mismatch`: a blob or directory does not have the size that its node says;
    - `nar-hash-mismatch`, `nar-size-mismatch`: the NAR is not the one on record;
    - `content-address-mismatch`: the content does not have the content address on record;
    - `store-path-mismatch`: the content address gives another store path, or none;
    - `wrong-signature`: a signature by a trusted key is wrong;
    - `untrusted`: there is neither a content address nor a signature by a trusted key.
    """


def mismatch(rule: str, where: str, what: str, *, expected: object, actual: object) -> VerifyError:
    """Return the error for a value that is not the one on record."""
    return VerifyError(f"{where}: {what}: expected {expected}, got {actual}", rule=rule)


def content_mismatch(where: str, node: DirectoryNode | FileNode, actual: object) -> VerifyError:
    """Return the error for a blob or directory that is not there, or is another one."""
    return mismatch("content-mismatch", where, _kind(node), expected=node.digest, actual=actual)


def size_mismatch(where: str, node: DirectoryNode | FileNode, actual: object) -> VerifyError:
    """Return the error for a blob or directory of another size than its node says."""
    what = f"size of the {_kind(node)} {node.digest}"
    return mismatch("size-mismatch", where, what, expected=node.size, actual=actual)


def _kind(node: DirectoryNode | FileNode) -> str:
    return "blob" if isinstance(node, FileNode) else "directory"


def unreadable(where: str, cause: Exception) -> VerifyError:
    """Return the error for something that the store cannot give."""
    return VerifyError(f"{where}: {' '.join(str(cause).split())}", rule="unreadable")
