#!/usr/bin/env bash
# Make .cache/helm-render, which renders the chart where there is no helm: Go and sprig come from the distribution's packages.
#
# Does nothing where helm is there. Exits with status 3 where it cannot: another distribution than Debian's family, or not root.
set -euo pipefail

command -v helm >/dev/null && exit 0
source=/usr/share/gocode/src/github.com
if ! command -v go >/dev/null || [ ! -d "$source/Masterminds/sprig" ] || [ ! -d "$source/ghodss/yaml" ]; then
    if ! command -v apt-get >/dev/null || [ "$(id -u)" -ne 0 ]; then
        echo "$0: no helm here, and Go with sprig is installed as root on Debian only; the tests of the chart are skipped" >&2
        exit 3
    fi
    export DEBIAN_FRONTEND=noninteractive
    apt-get -qq update
    apt-get -qq install --yes --no-install-recommends golang-go golang-github-masterminds-sprig-dev golang-github-ghodss-yaml-dev >/dev/null
fi
# Debian's packages are sources below one GOPATH, not modules.
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$here/../../.cache"
GO111MODULE=off GOPATH=/usr/share/gocode GOFLAGS= go build -o "$here/../../.cache/helm-render" "$here/render/main.go"
