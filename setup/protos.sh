#!/bin/sh
# Generates appliance/protos/*_pb2.py and .pyi below a directory: setup/protos.sh DIRECTORY
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
PATH=$root/.venv/bin:$PATH # protoc looks its mypy plug-in up there
"$root/.venv/bin/python" -m grpc_tools.protoc --proto_path="$root" \
    --python_out="$1" --mypy_out=quiet:"$1" "$root"/appliance/protos/*.proto
