#!/usr/bin/env bash
# Put promtool and prometheus on this machine, from the distribution's package: they check the rules and every query of the dashboards.
#
# Does nothing where both are there. Exits with status 3 where it cannot: another distribution than Debian's family, or not root.
set -euo pipefail

command -v promtool >/dev/null && command -v prometheus >/dev/null && exit 0
if ! command -v apt-get >/dev/null || [ "$(id -u)" -ne 0 ]; then
    echo "$0: no promtool here, and it is installed as root on Debian only; the tests of rules and queries are skipped" >&2
    exit 3
fi
# Installed, the package is a service: it would start now, and at every boot. Taken out of it, the two programs are only files.
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
apt-get -qq update
# As root, for apt's own user cannot write here.
apt-get -qq -o APT::Sandbox::User=root download prometheus
dpkg --fsys-tarfile prometheus_*.deb | tar -x ./usr/bin/promtool ./usr/bin/prometheus
install -t /usr/local/bin usr/bin/promtool usr/bin/prometheus
