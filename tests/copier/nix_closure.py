"""A closure in a Nix store below another root, made by Nix itself, and what Nix says of it."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

KEY_NAME = "test-1"

# Several outputs, references, references to themselves, symlinks, derivers.
EXPRESSION = """
let
  build = attributes: derivation ({
    system = builtins.currentSystem; builder = "/bin/sh"; PATH = "/usr/bin:/bin";
  } // attributes // { args = [ "-c" attributes.script ]; });
  lib = build {
    name = "lib-1.0"; outputs = [ "out" "dev" ]; text = TEXT;
    script = ''
      mkdir -p $out/lib $dev/include $out/empty
      echo lib > $out/lib/lib.so; echo $out $text > $dev/include/where; : > $out/lib/none
      head -c 200000 /dev/zero > $out/lib/large; echo end >> $out/lib/large
    '';
  };
  app = build {
    name = "app-2.0"; inherit lib;
    script = ''
      mkdir -p $out/bin; echo "#!/bin/sh $out $lib" > $out/bin/app; chmod 755 $out/bin/app
      ln -s $lib/lib $out/lib; ln -s bin/app $out/run; echo one > "$out/a b"
    '';
  };
in build {
  name = "all-3"; inherit app; dev = lib.dev; source = SOURCE;
  script = ''echo $app $dev $source > $out; chmod 755 $out'';
}
"""


class Nix(NamedTuple):
    """Runs Nix on a store below `root`."""

    root: Path

    @property
    def uri(self) -> str:
        return f"local?root={self.root}"

    @property
    def directory(self) -> Path:
        return self.root / "nix" / "store"

    def run(self, *words: str | Path, data: bytes | None = None) -> bytes:
        options = {
            "build-users-group": "",
            "sandbox": "false",
            "sandbox-paths": "/bin /lib /lib64 /usr",
            "substitute": "false",
        }
        # Before the words, whose options then take precedence.
        before = [word for pair in options.items() for word in ("--option", *pair)]
        after = ["--store", self.uri]
        if words[0] == "nix":
            after += ["--extra-experimental-features", "nix-command"]
        program, *rest = map(str, words)
        command = [program, *before, *rest, *after]
        done = subprocess.run(
            command,
            input=data,
            capture_output=True,
            check=False,
            env={**os.environ, "HOME": str(self.root)},
        )
        assert done.returncode == 0, (command, done.stderr)
        return done.stdout

    def text(self, *words: str | Path) -> str:
        return self.run(*words).decode().strip()

    def path_infos(self, *paths: str) -> dict[str, dict[str, Any]]:
        """Return what `nix path-info --json` says, by path."""
        found = []
        derivations = [path for path in paths if path.endswith(".drv")]
        others = [path for path in paths if not path.endswith(".drv")]
        for some, options in ((others, []), (derivations, ["--derivation"])):
            if some:
                found += json.loads(self.run("nix", "path-info", "--json", *options, *some))
        return {info["path"]: info for info in found}

    def dump(self, path: str) -> bytes:
        return self.run("nix-store", "--dump", self.directory / Path(path).name)


class NixClosure(NamedTuple):
    """What was made: the paths on top, and all that they refer to."""

    nix: Nix
    tops: list[str]
    closure: list[str]
    # What the first of `tops` refers to, and itself.
    built: list[str]
    public_key: str

    def named(self, name: str) -> str:
        """Return the path of that name, of several that of the derivation on top."""
        return next(path for path in self.built if path.endswith(f"-{name}"))

    def cache(self, directory: Path, compression: str) -> str:
        """Copy all to a new binary cache; return its address."""
        uri = f"file://{directory}"
        self.nix.run(
            "nix", "copy", "--no-check-sigs", "--to", f"{uri}?compression={compression}", *self.tops
        )
        return uri


def make_closure(directory: Path) -> NixClosure:
    """Make a closure below `directory`."""
    nix = Nix(directory / "root")
    nix.root.mkdir()
    source = directory / "source"
    source.mkdir()
    (source / "file").write_text("content\n")
    (source / "link").symlink_to("file")
    added = nix.text("nix-store", "--add", source)
    fixed = nix.text("nix-store", "--add-fixed", "sha256", source / "file")
    (source / "script").write_text("#!/bin/sh\n")
    recursive = nix.text("nix-store", "--add-fixed", "--recursive", "sha1", source)
    named = nix.text("nix", "store", "add-path", "--name", "named", source)
    text = f'builtins.toFile "text" "refers to ${{builtins.storePath {added}}}"'
    expression = EXPRESSION.replace("TEXT", text).replace("SOURCE", f"(builtins.storePath {named})")
    file = directory / "default.nix"
    file.write_text(expression)
    built = nix.text("nix-build", "--no-out-link", file)
    secret = directory / "secret"
    done = subprocess.run(
        ["nix-store", "--generate-binary-cache-key", KEY_NAME, secret, directory / "public"],
        check=True,
        capture_output=True,
    )
    assert done.returncode == 0
    nix.run("nix", "store", "sign", "-r", "-k", secret, built)
    nix.run("nix", "store", "sign", "-k", secret, named)
    app = next(path for path in nix.text("nix-store", "-qR", built).split() if "-app-" in path)
    rewrites = json.loads(nix.run("nix", "store", "make-content-addressed", "--json", app))
    tops = [built, fixed, recursive, rewrites["rewrites"][app]]
    closure = nix.text("nix-store", "--query", "--requisites", *tops).split()
    requisites = nix.text("nix-store", "--query", "--requisites", built).split()
    return NixClosure(nix, tops, closure, requisites, (directory / "public").read_text().strip())
