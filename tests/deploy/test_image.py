"""The gateway's images, built for real and started as Compose would start them: the one before vLLM with the flags of the Compose
file, the other with ergo-mini in its own process."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest
import support
from charts import CHART
from composition import composition, engine_flags, example
from support import ROOT, encode, held_out

from ergo_server.api.keys import new_key

STORE = ROOT / ".cache/images"
"""Where `tests/deploy/install.sh` put the base image."""

BUILDAH = ["buildah", "--root", f"{STORE}/graph", "--runroot", f"{STORE}/run", "--storage-driver", "vfs"]

MOST_BYTES = {"gateway": 300_000_000, "gateway-cpu": 1_600_000_000}
"""What the image of a service may grow to. 207 MB and 1.3 GB when they were made, of which 128 the base with Python."""

PLANTED = (
    "bin/pip3.11",
    "bin/wheel",
    "lib/python3.11/ensurepip/__init__.py",
    "lib/python3.11/site-packages/_distutils_hack/__init__.py",
    "lib/python3.11/site-packages/distutils-precedence.pth",
    "lib/python3.11/site-packages/pip/__init__.py",
    "lib/python3.11/site-packages/pkg_resources/__init__.py",
    "lib/python3.11/site-packages/setuptools-79.0.1.dist-info/METADATA",
    "lib/python3.11/site-packages/setuptools/__init__.py",
    "lib/python3.11/site-packages/wheel/__init__.py",
)
"""What the official image of Python has below /usr/local, where Debian's, of which the test's base is made, has nothing."""

INSTALLERS = re.compile(
    r"(pip|setuptools|wheel|pkg_resources|_distutils_hack)([-\d].*)?|distutils-precedence\.pth|ensurepip|python-wheels"
)
"""Names of files and folders by which packages are installed."""

COMPILERS = re.compile(
    r"([a-z\d_]+-linux-gnu-)?(cc|c\+\+|gcc|g\+\+|clang|cpp|as|ld|ar|nvcc|rustc|cargo|go|make|cmake|ninja|git|curl|wget)(-[\d.]+)?"
)
"""Names of programs that build, or fetch what is built."""


def buildah(*arguments: str) -> str:
    """Run buildah; return what it says."""
    done = subprocess.run([*BUILDAH, *arguments], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.strip()


@dataclass(frozen=True, slots=True)
class Image:
    """An image that was built."""

    service: str
    """The service of the Compose file that runs it."""
    root: Path
    """Its files."""
    config: dict[str, Any]
    """User, variables, command, health check."""
    size: int
    """Bytes, its base included."""

    @property
    def environment(self) -> dict[str, str]:
        """Its variables."""
        return dict(line.split("=", 1) for line in self.config["Env"])

    @property
    def site(self) -> Path:
        """Where its packages are."""
        return next(self.root.glob("opt/ergo/lib/python3*/site-packages"))

    def contained(self, secrets: Path, *program: str) -> list[str]:
        """Return the command that runs a program as Compose runs the image's own, with a folder of secrets."""
        contain = ["unshare", "--mount", "--pid", "--fork", "--kill-child", f"{ROOT}/tests/deploy/contain.sh"]
        return [*contain, str(self.root), str(secrets), *self.config["User"].split(":"), *program]


def pip_secrets(folder: Path) -> list[str]:
    """Return the arguments that hand this machine's way to its package index to the build, and to the build only."""
    said = subprocess.run(["pip", "config", "list"], capture_output=True, text=True, check=True, env=os.environ).stdout
    settings: dict[str, str] = {}
    for source in ("global", ":env:"):  # the later one wins, as with pip
        settings |= re.findall(rf"^{source}\.([\w-]+)='(.*)'$", said, re.MULTILINE)
    # Certificates, constraints and wheels of this machine; pip does not go on without a file of constraints that it is told of.
    # What they are mounted on stays in the image, empty, so it has a name that says nothing.
    paths = dict.fromkeys(word for value in settings.values() for word in value.split() if word[0] == "/" and Path(word).exists())
    mounted = {path: f"/mnt/{number}" for number, path in enumerate(paths)}
    conf = folder / "pip.conf"
    lines = (f"{name} = {' '.join(mounted.get(word, word) for word in value.split())}" for name, value in settings.items())
    conf.write_text("\n".join(["[global]", *lines, ""]))
    volumes = (f"--volume={path}:{target}:ro" for path, target in mounted.items())
    return [f"--secret=id=pip.conf,src={conf}", *volumes]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An image to begin with, in which Python's packages are in both places where images have them."""
    if not shutil.which("buildah") or not (STORE / "graph").exists():
        pytest.skip("no buildah with a base image; `make test` installs both as root on Debian")
    folder = tmp_path_factory.mktemp("local")
    for name in PLANTED:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("# planted\n")
    container = buildah("from", "--pull-never", "localhost/ergo-test-python")
    try:
        buildah("copy", "--quiet", container, str(folder), "/usr/local")
        # With a name: one without goes when the first image that was made from it does.
        buildah("commit", "--quiet", container, "ergo-test-slim")
    finally:
        buildah("rm", container)
    yield "localhost/ergo-test-slim"
    buildah("rmi", "localhost/ergo-test-slim")


@pytest.fixture(scope="module", params=["gateway", pytest.param("gateway-cpu", marks=pytest.mark.image)])
def image(request: pytest.FixtureRequest, base: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Image]:
    """The image of one of the Compose file's gateways, with its build arguments but for what it begins with."""
    service: str = request.param
    given = composition(example())["services"][service]["build"]["args"] | {"PYTHON_IMAGE": base}
    options = ["--isolation", "chroot", "--network", "host", "--format", "docker", "--pull-never", "--quiet"]
    arguments = [*(f"--build-arg={name}={value}" for name, value in given.items()), *pip_secrets(tmp_path_factory.mktemp("pip"))]
    began = time.monotonic()
    name = buildah("bud", *options, *arguments, "--file", "docker/gateway.Dockerfile", ".").splitlines()[-1]
    took = time.monotonic() - began
    container = buildah("from", "--pull-never", name)
    try:
        listed = json.loads(buildah("inspect", "--type", "image", name))
        root = Path(buildah("mount", container))
        size = sum(path.lstat().st_size for path in root.rglob("*") if not path.is_symlink() and path.is_file())
        print(f"\nimage of {service}: {size / 1e6:.0f} MB, built in {took:.0f} s")
        yield Image(service, root, listed["Docker"]["config"], size)
    finally:
        buildah("rm", container)
        buildah("rmi", name)


def test_the_image_says_how_it_runs(image: Image) -> None:
    """The image's user is a number and not root, and it has a health check and the program as its entry point."""
    assert image.config["User"] == "10001:10001"
    assert image.config["Entrypoint"] == ["ergo-vqa"]
    assert image.config["Cmd"] == ["serve"]
    assert image.config["Healthcheck"]["Test"][0] == "CMD"


def test_the_image_holds_the_gateway_and_no_tools(image: Image) -> None:
    """The image is small, has certificates, and nowhere a compiler, pip, git, the sources, the tests or the build's pip.conf.
    Where a model runs in the gateway, and only there, is torch with the setuptools that it requires, and nothing for GPUs."""
    assert (image.root / "opt/ergo/bin/ergo-vqa").exists()
    installed = {path.name.split("-")[0] for path in image.site.glob("*.dist-info")}
    assert "ergo_vqa" in installed
    assert not {"pip", "wheel", "hatchling", "pytest"} & installed
    torch = image.service == "gateway-cpu"
    assert ("torch" in installed) == torch
    assert not [name for name in installed if name.startswith(("nvidia", "triton"))]
    for folder, folders, files in os.walk(image.root):
        built = [name for name in files if COMPILERS.fullmatch(name) and Path(folder, name).lstat().st_mode & 0o111]
        assert not built, folder
        found = {name for name in (*folders, *files) if INSTALLERS.fullmatch(name)}
        if torch and folder == str(image.site):
            assert {re.sub(r"-\d.*", "", name) for name in found} <= {"setuptools", "_distutils_hack", "distutils-precedence.pth"}
            folders[:] = set(folders) - found
        else:
            assert not found, folder
    assert not [name for name in ("src", "wheel", "opt/pip", "etc/pip.conf", "root/.cache") if (image.root / name).exists()]
    assert (image.root / "etc/ssl/certs/ca-certificates.crt").stat().st_size > 0
    assert image.size < MOST_BYTES[image.service]


def test_nobody_but_root_may_change_the_image(image: Image) -> None:
    """No file of the gateway belongs to the user that it runs as, or may be written by everybody."""
    for path in (image.root / "opt").rglob("*"):
        seen = path.lstat()
        assert seen.st_uid == 0, path
        assert path.is_symlink() or not seen.st_mode & 0o002, path


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of vLLM with ergo-mini and the flags of the Compose file, but for its address and what a small machine cannot give."""
    if reason := support.why_no_vllm():
        pytest.skip(reason)
    ours = ("--host=", "--port=", "--served-model-name=", "--gpu-memory-utilization=", "--max-model-len=")
    flags = (flag for flag in engine_flags() if not flag.startswith(ours))
    with support.vllm(tmp_path_factory.mktemp("engine") / "log", *flags) as url:
        yield url


@dataclass(frozen=True, slots=True)
class Running:
    """A gateway that runs in its container."""

    url: str
    key: str
    secrets: Path
    pid: int
    environment: dict[str, str]
    container: subprocess.Popen[bytes]
    log: Path

    def status(self, name: str) -> str:
        """Return a line of the process' status."""
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith(f"{name}:"))


@pytest.fixture
def running(image: Image, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Running]:
    """The image's gateway as the Compose file starts it, but for its address and, before vLLM, for the engine's address and for
    ergo-mini's prompts."""
    key, line = new_key("somebody")
    secrets = tmp_path / "secrets"
    secrets.mkdir()
    (secrets / "api_keys").write_text(line)
    secrets.chmod(0o755)
    port = support.free_port()
    here = {"ERGO_HOST": "127.0.0.1", "ERGO_PORT": str(port)}
    if image.service == "gateway":
        here["ERGO_ENGINE_URL"] = request.getfixturevalue("engine")
        here["ERGO_PROMPTS"] = f"/{(image.site / 'ergo_mini/prompts.toml').relative_to(image.root)}"
    environment = image.environment | composition(example())["services"][image.service]["environment"] | here
    log = tmp_path / "log"
    began = time.monotonic()
    with log.open("wb") as out:
        command = image.contained(secrets, *image.config["Entrypoint"], *image.config["Cmd"])
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=out)
    try:
        url = f"http://127.0.0.1:{port}"
        support.wait_until(lambda: support.answers(f"{url}/readyz") or process.poll() is not None, "the gateway is ready")
        assert process.poll() is None, log.read_text()
        took = time.monotonic() - began
        pid = int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text())
        print(f"\n{image.service}: ready {took:.1f} s after its start")
        yield Running(url, key, secrets, pid, environment, process, log)
    finally:
        process.kill()
        process.wait()


def test_the_image_answers_as_compose_starts_it(image: Image, running: Running) -> None:
    """Started without root, capabilities or a root that can be written, the image's gateway is healthy, answers a scene for who
    has a key, through an engine with the Compose file's flags or in its own process, refuses who has none, is what the program of
    `helm test` wants, run in the same image, and ends on SIGTERM with status 0."""
    assert running.status("Uid").split() == ["10001"] * 4
    assert running.status("Gid").split() == ["10001"] * 4
    assert {running.status(name) for name in ("CapEff", "CapPrm", "CapInh", "CapBnd")} == {"0" * 16}
    assert running.status("NoNewPrivs") == "1"
    mounts = [line.split() for line in Path(f"/proc/{running.pid}/mountinfo").read_text().splitlines()]
    options = {mount[4]: mount[5].split(",") for mount in mounts}
    assert "ro" in options["/"]
    assert "rw" in options["/tmp"]

    made = held_out(0)

    def ask(**headers: str) -> httpx2.Response:
        return httpx2.post(
            f"{running.url}/v1/vqa",
            files={"image": ("scene.jpg", encode(made))},
            data={"question": made.question},
            headers=headers,
            trust_env=False,
            timeout=support.START_SECONDS,
        )

    assert ask().status_code == 401
    asked = ask(authorization=f"Bearer {running.key}")
    assert asked.status_code == 200, asked.text
    answer = asked.json()
    assert answer["answer"] == made.answer
    assert answer["regions"][0]["outcome"] == "zoomed"
    assert answer["visual_tokens"]["source"] == "engine"
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] > 0

    program = ["python", "-c", (CHART / "files/ask.py").read_text(), running.url]
    environment = image.environment | {"ERGO_API_KEY": running.key}
    command = image.contained(running.secrets, *program)
    tested = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=support.START_SECONDS)
    assert tested.returncode == 0, tested.stdout + tested.stderr
    assert re.search(r"reused [1-9]", tested.stdout)

    _, *check = image.config["Healthcheck"]["Test"]
    health = ["nsenter", "--target", str(running.pid), "--mount", "--root", *check]
    assert subprocess.run(health, env=running.environment, check=False, timeout=60).returncode == 0
    dead = running.environment | {"ERGO_PORT": str(support.free_port())}
    assert subprocess.run(health, env=dead, check=False, timeout=60, stderr=subprocess.DEVNULL).returncode != 0

    os.kill(running.pid, signal.SIGTERM)
    assert running.container.wait(60) == 0, running.log.read_text()
