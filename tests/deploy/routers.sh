#!/usr/bin/env bash
# Make VENV with vllm-router, in the version that helm/recipes/vllm-router names: tests/deploy/test_routers.py runs it.
#
#   tests/deploy/routers.sh VENV
#
# Exits with status 3 where its wheel does not run: it is built for Linux on x86-64 and arm64 only.
set -euo pipefail

[ $# -eq 1 ] && [ -n "$1" ] || { echo "usage: $0 VENV" >&2; exit 2; }
here=$(cd "$(dirname "$0")" && pwd)
version=$(sed -n 's/^appVersion: "\([0-9.]*\)".*/\1/p' "$here/../../helm/recipes/vllm-router/Chart.yaml")
[ -x "$1/bin/python" ] || "${PYTHON:-python3}" -m venv "$1"
if ! "$1/bin/python" -m pip install --quiet --only-binary=:all: "vllm-router==$version"; then
    echo "$0: no wheel of vllm-router $version for this machine; the test of routers is skipped" >&2
    exit 3
fi
