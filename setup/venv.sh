#!/bin/sh
# Makes a virtual environment with the project (editable) and its development tools.
# usage: setup/venv.sh PYTHON DIRECTORY
set -eu
python=$1
venv=$2
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "setup: $python must be Python 3.11 or newer; name one with make PYTHON=..." >&2
    exit 1
fi
[ -x "$venv/bin/pip" ] || "$python" -m venv "$venv"

# Debian 12's pip knows no --group, so the group is spelt out as a requirements file.
requirements=$(mktemp)
trap 'rm -f "$requirements"' EXIT
"$venv/bin/python" - dev >"$requirements" <<'PROGRAM'
import sys, tomllib
with open("pyproject.toml", "rb") as file:
    print(*tomllib.load(file)["dependency-groups"][sys.argv[1]], sep="\n")
PROGRAM
# compat: a plain path on sys.path, where the default hooks the import system in every process.
echo "setup: installing the project and its tools into $venv"
"$venv/bin/python" -m pip --disable-pip-version-check install --quiet \
    --config-settings editable_mode=compat --editable . --requirement "$requirements"
