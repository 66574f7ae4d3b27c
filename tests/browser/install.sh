#!/usr/bin/env bash
# Put Chromium on this machine, from the distribution's packages: the browser that the tests of the page drive.
#
# Does nothing where one is there. Exits with status 3 where it cannot: another distribution than Debian's family, or not root.
set -euo pipefail

command -v chromium >/dev/null && exit 0
if ! command -v apt-get >/dev/null || [ "$(id -u)" -ne 0 ]; then
    echo "$0: no chromium here, and it is installed as root on Debian only; the tests of the page are skipped" >&2
    exit 3
fi
export DEBIAN_FRONTEND=noninteractive
apt-get -qq update
apt-get -qq install --yes --no-install-recommends chromium fonts-dejavu-core >/dev/null
