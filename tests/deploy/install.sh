#!/usr/bin/env bash
# What the test of the gateway's image needs: buildah, and a base image with Python, made from the distribution's packages.
#
#   tests/deploy/install.sh STORE
#
# The image is `ergo-test-python` in buildah's store below STORE. Does nothing where it is there. Exits with status 3 where it
# cannot: another distribution than Debian's family, or not root.
set -euo pipefail

[ $# -eq 1 ] && [ -n "$1" ] || { echo "usage: $0 STORE" >&2; exit 2; }
if ! command -v apt-get >/dev/null || [ "$(id -u)" -ne 0 ]; then
    echo "$0: images are built as root on Debian only; the test of the gateway's image is skipped" >&2
    exit 3
fi
if ! command -v buildah >/dev/null || ! command -v debootstrap >/dev/null; then
    export DEBIAN_FRONTEND=noninteractive
    apt-get -qq update
    apt-get -qq install --yes --no-install-recommends buildah debootstrap >/dev/null
fi

# vfs copies every layer and needs nothing of the kernel; chroot needs no runtime.
buildah() { command buildah --root "$1/graph" --runroot "$1/run" --storage-driver vfs "${@:2}"; }
buildah "$1" inspect --type image ergo-test-python >/dev/null 2>&1 && exit 0

mkdir -p "$1"
root=$(mktemp -d "$1/base.XXXXXX")
trap 'rm -rf "$root"' EXIT
# Debian 12 has the Python that constraints.txt was tried with.
debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates bookworm "$root" >"$1/debootstrap.log" 2>&1 \
    || { tail -5 "$1/debootstrap.log" >&2; exit 1; }
# As the slim images do, so that the size that the test prints tells something.
rm -rf "$root"/var/cache/apt/archives/*.deb "$root"/var/lib/apt/lists/* "$root"/usr/share/{doc,man,locale}/*
container=$(buildah "$1" from scratch)
buildah "$1" copy --quiet "$container" "$root" / >/dev/null
buildah "$1" commit --quiet "$container" ergo-test-python >/dev/null
buildah "$1" rm "$container" >/dev/null
