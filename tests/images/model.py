"""Images made in Python from the documented layout, to compare with those of the C builder."""

import struct

from appliance.castore.directory import Directory, DirectoryNode, FileNode, SymlinkNode
from appliance.fuse_proto.encode import NO_ENTRY, pack_direntplus
from appliance.images import layout
from appliance.images.entries import fnv1a, pack_record
from appliance.images.layout import Kind


def kind_of(node: DirectoryNode | FileNode | SymlinkNode) -> Kind:
    if isinstance(node, DirectoryNode):
        return Kind.DIRECTORY
    if isinstance(node, SymlinkNode):
        return Kind.SYMLINK
    return Kind.EXECUTABLE if node.executable else Kind.FILE


def expected_pieces(directory: Directory) -> dict[int, bytes]:
    """Return the pieces of the image of `directory`, by number."""
    nodes = sorted(directory.nodes(), key=lambda node: node.name)
    places = [1]
    for node in nodes:
        places.append(places[-1] + 1 + (node.size if isinstance(node, DirectoryNode) else 0))
    size = layout.PIECE_ENTRIES
    num_pieces = max(1, -(-len(nodes) // size))
    pieces = {
        number: _piece(nodes, places, first=number * size, num_pieces=num_pieces)
        for number in range(num_pieces)
    }
    if num_pieces > 1:
        firsts = [(places[n * size], nodes[n * size].name) for n in range(1, num_pieces)]
        pieces[0] = _with_guide(pieces[0], firsts)
    return pieces


def _piece(
    nodes: list[DirectoryNode | FileNode | SymlinkNode],
    places: list[int],
    *,
    first: int,
    num_pieces: int,
) -> bytes:
    chunk = nodes[first : first + layout.PIECE_ENTRIES]
    links = 0 if first else 2
    records = [pack_direntplus(NO_ENTRY, 0, off, 4, name) for off, name in ((1, b"."), (2, b".."))][
        :links
    ]
    digests = b""
    targets = b""
    for index, node in enumerate(chunk, first):
        kind = kind_of(node)
        records.append(
            pack_record(
                node.name,
                kind,
                nodeid=places[index],
                generation=0,
                ino=places[index],
                st_size=len(node.target) if isinstance(node, SymlinkNode) else node.size,
                off=index + 3,
            )
        )
    offsets_at = layout.HEADER.size + 8 * (len(chunk) + 1)
    records_at = -(-(offsets_at + 4 * (links + len(chunk) + 1)) // 8) * 8
    offsets = [records_at]
    for record in records:
        offsets.append(offsets[-1] + len(record))
    digests_at = offsets[-1]
    targets_at = digests_at + 32 * len(chunk)
    for node in chunk:
        if isinstance(node, SymlinkNode):
            at = targets_at + len(targets)
            digests += struct.pack("<QII16x", fnv1a(node.target), at, len(node.target))
            targets += node.target
        else:
            digests += node.digest
    header = layout.HEADER.pack(
        layout.MAGIC, len(chunk), len(nodes), places[-1] - 1, first, num_pieces, offsets_at,
        digests_at, links, 0,
    )  # fmt: skip
    head = header + struct.pack(f"<{len(chunk) + 1}Q", *places[first : first + len(chunk) + 1])
    head += struct.pack(f"<{len(offsets)}I", *offsets)
    whole = head.ljust(records_at, b"\0") + b"".join(records) + digests + targets
    return whole.ljust(-(-len(whole) // 8) * 8, b"\0")


def _with_guide(piece: bytes, firsts: list[tuple[int, bytes]]) -> bytes:
    guide_at = len(piece)
    name_at = guide_at + 16 * len(firsts)
    guide = b""
    for place, name in firsts:
        guide += struct.pack("<QII", place, name_at, len(name))
        name_at += len(name)
    names = b"".join(name for _place, name in firsts)
    return piece[:44] + struct.pack("<I", guide_at) + piece[48:] + guide + names
