#!/usr/bin/env bash
# Run a program of an image as `docker run --read-only --tmpfs /tmp --cap-drop ALL --security-opt no-new-privileges` would, on the
# machine's own network. Wants root, and namespaces of mounts and processes of its own:
#
#   unshare --mount --pid --fork --kill-child tests/deploy/contain.sh ROOT SECRETS USER GROUP PROGRAM…
#
# SECRETS is a folder that appears as /run/secrets. The environment is handed on as it is.
set -euo pipefail
root=$1 secrets=$2 user=$3 group=$4
shift 4
mount --bind "$root" "$root"
mount -t proc proc "$root/proc"
mount --rbind /dev "$root/dev"
mount -t tmpfs -o mode=1777 tmpfs "$root/tmp"
mount -t tmpfs tmpfs "$root/run"
mkdir "$root/run/secrets"
mount --bind "$secrets" "$root/run/secrets"
mount -o remount,bind,ro "$root"
# The program's PATH is the image's.
exec /usr/sbin/chroot "$root" setpriv --reuid "$user" --regid "$group" --clear-groups --bounding-set=-all --inh-caps=-all --no-new-privs -- "$@"
