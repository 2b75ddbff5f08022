"""A tree of three levels, net-tools 1.60, whose entries and NAR size are published."""

import pytest

from appliance.castore.closure import ClosureChecker
from appliance.castore.digest import Digest
from appliance.castore.directory import Directory, DirectoryNode, FileNode, SymlinkNode
from appliance.castore.size_dialect import SizeDialect
from appliance.nix.nar import NarWriter

LEAVES = {
    "bin": """
        arp executable 55288 fbc4614a292711cbcce499819cf0a917f7d091beea08cb5baa7676f5ee4f82bb
        hostname executable 17704 9c6ae4b5e46cb567450eaa2ad8dd9b38d7ed010284f726e1c7f31cebaa8a0130
        ifconfig executable 72576 25be3b1df41a454279092c2a83f00bffe8c09c269870154da8ca05fe9268352e
        nameif executable 18776 8eaac5db71088ee5e6301f2c3af242390c5715af50aa1cdf84220877035462b1
        netstat executable 131784 13347edd2a9a170b3fc70ae49289259faab5056b24a791ebaff9e93556aa2fb2
        plipconfig executable 13160 197c80dc81dcb4c045e1f976514f50bfa469519ad4a9e7aae70d5332ff284060
        rarp executable 30384 0885b485032b3c7a3e244cf8cc45019e79438c6f5e324654b668918ea0cb6e0d
        route executable 61928 4d1420899e76f4e29253ee9b787d23806cffe633dc4a10293902a060ffe2bbd7
        slattach executable 35672 fb25c373b7b10b25cd7b62f67183fe3680f648c3dbd80cfeb8d3da329b474b05
        dnsdomainname symlink hostname
        domainname symlink hostname
        nisdomainname symlink hostname
        ypdomainname symlink hostname
    """,
    "share/man/man1": """
        dnsdomainname.1.gz file 40 988abdfa64d5b927fe374356b318c72bcbe3171c17f417eb4aa4996439ca2dee
        domainname.1.gz file 40 988abdfa64d5b927fe374356b318c72bcbe3171c17f417eb4aa4996439ca2dee
        hostname.1.gz file 1660 bf89e62800246679700438d6dd9df60e0dee00f7644f05089df036de85f475db
        nisdomainname.1.gz file 40 988abdfa64d5b927fe374356b318c72bcbe3171c17f417eb4aa4996439ca2dee
        ypdomainname.1.gz file 40 988abdfa64d5b927fe374356b318c72bcbe3171c17f417eb4aa4996439ca2dee
    """,
    "share/man/man5": """
        ethers.5.gz file 563 42638cc41893cf60d6ff43bc16b4fd22d2f2050b52dc6a6bff34e26a383a07e3
    """,
    "share/man/man8": """
        arp.8.gz file 2464 f5354ef5f644f7520f42a02651d989f968f2efebbae1f455015777b7685592ef
        ifconfig.8.gz file 3382 1865251132ee7791354c3c24dbaf66dbfc177bbae13d05d2ca6e2ce4efb8a8be
        nameif.8.gz file 523 73c127e83ba849dc0edf705faf06012c62e9186701946426ca9522c0dce442b6
        netstat.8.gz file 4284 c086434a4357aa84a724a07c6538461cf245a2ef124418ba5256e98e6a0f7063
        plipconfig.8.gz file 889 2ad91da89e0d05d0b049aa64ba2928c645e1bb5e728d487b094f0a821e2683ab
        rarp.8.gz file 1198 3d51c1d06a591e6d9af506d2e77d7dd0703d8464c37dfb10843be1a9df46ee9f
        route.8.gz file 3525 2a5a4b4f91f278e4a925b27fa72ac08a4a65c95f07a04844eb46f9c9e1179621
        slattach.8.gz file 1441 3f056b20e1e4f0ba1615666b5796e99d83a820af8aca164da26d948eca918fd4
    """,
}
NAR_SIZE = 464152


def leaf(listing: str) -> Directory:
    files: list[FileNode] = []
    symlinks: list[SymlinkNode] = []
    for line in listing.split("\n"):
        match line.split():
            case [name, "symlink", target]:
                symlinks.append(SymlinkNode(name.encode(), target.encode()))
            case [name, kind, size, digest]:
                files.append(
                    FileNode(
                        name.encode(),
                        Digest(bytes.fromhex(digest)),
                        int(size),
                        executable=kind == "executable",
                    )
                )
    return Directory([], files, symlinks)


def parent(
    children: dict[bytes, Directory], dialect: SizeDialect, *symlinks: SymlinkNode
) -> Directory:
    nodes = [
        DirectoryNode(name, child.digest(), child.size(dialect)) for name, child in children.items()
    ]
    return Directory(nodes, [], symlinks)


def closure(dialect: SizeDialect) -> list[Directory]:
    """Return the directories, leaves first."""
    bin_, man1, man5, man8 = map(leaf, LEAVES.values())
    man = parent({b"man1": man1, b"man5": man5, b"man8": man8}, dialect)
    share = parent({b"man": man}, dialect)
    top = parent({b"bin": bin_, b"share": share}, dialect, SymlinkNode(b"sbin", b"bin"))
    return [bin_, man1, man5, man8, man, share, top]


@pytest.mark.parametrize(
    ("dialect", "size", "digest"),
    [
        (
            SizeDialect.DOCUMENTED,
            34,
            "189a4a0d0f964c950afabb8b83c7f8a5e3511c3c657368411a6d0ae8efd318db",
        ),
        (
            SizeDialect.DOUBLED,
            68,
            "052d37d6b39cb83db46be0cb90d78d641d85a4c5c6f41083939c643b2915f93c",
        ),
    ],
)
def test_root_has_the_size_and_digest_of_all_below_it(
    dialect: SizeDialect, size: int, digest: str
) -> None:
    directories = closure(dialect)
    checker = ClosureChecker()
    for directory in directories:
        assert checker.add(directory)
        assert Directory.from_bytes(directory.to_bytes()) == directory

    assert checker.finish().hex() == digest
    assert directories[-1].size(dialect) == size


def test_nar_has_the_published_size() -> None:
    # We do not have the contents, but only their sizes matter.
    directories = {directory.digest(): directory for directory in closure(SizeDialect.DOCUMENTED)}
    writer = NarWriter(lambda _data: None)

    def write(directory: Directory) -> None:
        writer.directory()
        for node in directory.nodes():
            writer.entry(node.name)
            match node:
                case DirectoryNode():
                    write(directories[node.digest])
                case FileNode():
                    writer.file(bytes(node.size), executable=node.executable)
                case SymlinkNode():
                    writer.symlink(node.target)
        writer.end_directory()

    write(closure(SizeDialect.DOCUMENTED)[-1])
    assert writer.finish() == NAR_SIZE
