#!/bin/sh
# Builds a second server that speaks S3, for `make other-s3`: setup/s3_gateway.sh PROGRAM
set -eu
version=v1.8.0

command -v go >/dev/null || { echo "setup: make other-s3 needs go(1), 1.25 or newer" >&2; exit 1; }
echo "setup: building versitygw $version"
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
GOBIN=$directory go install "github.com/versity/versitygw/cmd/versitygw@$version"
mkdir -p "$(dirname "$1")"
mv "$directory/versitygw" "$1"
