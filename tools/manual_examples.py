"""Examples and exit statuses of the manual pages, which the parser does not know.

A test parses every example with the parser, and compares the names with its commands.
"""

from typing import Final, NamedTuple


class Example(NamedTuple):
    """A command line and what it is for."""

    purpose: str
    line: str


EXAMPLES: Final[dict[str, tuple[Example, ...]]] = {
    "import": (
        Example("Put a tree into the store and print its store path:", "appliance import ./site"),
        Example(
            "Put it into a store that another machine offers:",
            "appliance import --store grpc+http://builder:8000 ./site",
        ),
    ),
    "virtiofs": (
        Example(
            "Serve the host's store to virtual machines on two sockets:",
            "appliance virtiofs --socket-path=/run/vm1.sock --socket-path=/run/vm2.sock",
        ),
        Example(
            "Serve it to virtual machines that `appliance attach` names while it runs:",
            "appliance virtiofs --listen-dir=/run/appliance-virtiofs",
        ),
        Example(
            "Serve what a bucket has, with a cache on this host:",
            "appliance virtiofs --store objectstore+s3://bucket/store /run/vm1.sock",
        ),
    ),
    "profile": (
        Example(
            "See what a boot reads, once `virtiofs --record-profile=web` has recorded it:",
            "appliance profile show web",
        ),
        Example("Print it for other hosts:", "appliance profile export web"),
        Example(
            "Have it fetched there whenever a guest of the view web connects:",
            "appliance profile import web web.profile",
        ),
    ),
    "attach": (
        Example(
            "Let the virtual machine web1, of the group kvm, have the view web:",
            "appliance attach --view=web --socket-group=kvm web1",
        ),
    ),
    "detach": (Example("End its session and remove its socket:", "appliance detach web1"),),
    "mount": (
        Example(
            "Mount the store, with its root listed, for all users:",
            "appliance mount --list-root --allow-other /mnt/store",
        ),
    ),
    "daemon": (
        Example(
            "Offer the store on a Unix socket and on a port of this host:",
            "appliance daemon -l /run/appliance/store.sock -l [::1]:8000",
        ),
    ),
    "http": (Example("Offer the store as a binary cache for Nix:", "appliance http"),),
    "status": (Example("Show what is served, for a program:", "appliance status --json"),),
    "top": (
        Example("Watch what virtual machines do, the slowest first:", "appliance top --sort p99"),
        Example("Log it, a line for each every minute:", "appliance top --interval 60"),
    ),
    "metrics": (
        Example(
            "Print what Prometheus would be told, in its other format:",
            "appliance metrics --format openmetrics",
        ),
    ),
    "bugreport": (
        Example(
            "Collect what a report needs, with the lines of a log of your own:",
            "appliance bugreport --log /var/log/appliance.log",
        ),
    ),
    "bench": (
        Example(
            "Measure small reads on the socket of a back-end:",
            "appliance bench --ops lookup,read4k --seconds 5 /run/vm1.sock",
        ),
    ),
    "doctor": (
        Example("Check whether this host can mount the store:", "appliance doctor mount"),
        Example(
            "Let a script decide whether guests can be served:",
            "appliance doctor --json virtiofs",
        ),
    ),
    "copy": (
        Example(
            "Copy a closure from the Nix store of this machine:",
            "appliance copy --recursive /run/current-system",
        ),
        Example(
            "Copy it from a binary cache:",
            "appliance copy -r --from https://cache.nixos.org --trusted-public-keys KEYS PATH",
        ),
        Example(
            "Publish a closure of the store in a bucket:",
            "appliance copy --to objectstore+s3://bucket/store?region=eu-central-1 PATH",
        ),
    ),
    "verify": (
        Example("Verify everything that is stored:", "appliance verify"),
        Example(
            "Verify it, and replace what is damaged from another store:",
            "appliance verify --repair --from grpc+http://builder:8000",
        ),
    ),
    "ls": (Example("List a store path with modes and sizes:", "appliance ls -lR PATH"),),
    "cat": (Example("Show one file:", "appliance cat PATH/etc/os-release"),),
    "nar": (Example("Write a store path into an archive:", "appliance nar PATH"),),
    "path-info": (
        Example("Show all that is known of a store path:", "appliance path-info --json PATH"),
    ),
}

# Beside those that every command has.
FURTHER_STATUSES: Final[dict[str, tuple[tuple[str, str], ...]]] = {
    "doctor": (("1", "This host lacks what one of the uses needs."),),
    "verify": (("1", "Something is damaged, and was not repaired."),),
    "copy": (("1", "At least one path was refused; the others have been copied."),),
    "path-info": (("1", "The store does not have one of the paths."),),
}
