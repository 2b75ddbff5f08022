#!/bin/sh
# Sees to it that the Debian packages of a make target are installed: setup/packages.sh venv|demo|test|system
# Root installs what is missing. Anybody else gets one list of it, and status 1.
set -eu
here=$(dirname "$0")
case $1 in
    venv) targets='venv' ;;
    demo) targets='venv demo' ;;
    test) targets='venv demo test' ;;
    system) targets='venv demo test system' ;;
    *) echo "usage: $0 venv|demo|test|system" >&2; exit 2 ;;
esac

wanted=
for target in $targets; do
    wanted="$wanted $(sed -n "s/^$target  *\([^ ]*\).*/\1/p" "$here/packages.txt" | tr '\n' ' ')"
done
if ! command -v apt-get >/dev/null; then
    echo "setup: this is no Debian; going on as if these were installed:$wanted" >&2
    exit 0
fi

missing=
for package in $wanted; do
    state=$(dpkg-query --show --showformat '${db:Status-Status}' "$package" 2>/dev/null || true)
    [ "$state" = installed ] || missing="$missing $package"
done

# The guests' kernels are downloaded as packages and never installed: what they take is package lists.
case $1 in
    venv) kernels= ;;
    demo) kernels=kernel- ;;
    test | system) kernels='kernel- kernel6.12-' ;;
esac
lists=
for kernel in $kernels; do
    if ! ls -d "$here/../build/vm/$kernel"* >/dev/null 2>&1; then
        [ -n "$(apt-cache madison linux-image-cloud-amd64 2>/dev/null)" ] || lists=missing
    fi
done
[ -n "$missing$lists" ] || exit 0

if [ "$(id -u)" != 0 ]; then
    echo "setup: make $1 needs, as root:" >&2
    echo "    apt-get update${missing:+ && apt-get install$missing}" >&2
    exit 1
fi
echo "setup: apt-get update${missing:+ and install$missing}"
export DEBIAN_FRONTEND=noninteractive
apt-get -qq update
[ -z "$missing" ] || apt-get -qq -o Dpkg::Use-Pty=0 install --yes --no-install-recommends $missing >/dev/null
