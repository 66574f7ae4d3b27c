"""The gateway's image, built for real and started as Compose would start it, before vLLM with the flags of the Compose file."""

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
from composition import composition, engine_flags, example
from support import ROOT, encode, held_out

from ergo_server.api.keys import new_key

STORE = ROOT / ".cache/images"
"""Where `tests/deploy/install.sh` put the base image."""

BUILDAH = ["buildah", "--root", f"{STORE}/graph", "--runroot", f"{STORE}/run", "--storage-driver", "vfs"]

MOST_BYTES = 300_000_000
"""What the image may grow to. 213 MB when it was made, of which 128 the base with Python."""


def buildah(*arguments: str) -> str:
    """Run buildah; return what it says."""
    done = subprocess.run([*BUILDAH, *arguments], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.strip()


@dataclass(frozen=True, slots=True)
class Image:
    """An image that was built."""

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


def pip_secrets(folder: Path) -> list[str]:
    """Return the arguments that hand this machine's way to its package index to the build, and to the build only."""
    said = subprocess.run(["pip", "config", "list"], capture_output=True, text=True, check=True, env=os.environ).stdout
    settings = {match[1]: match[2] for match in re.finditer(r"^(?:global|:env:)\.([\w-]+)='(.*)'$", said, re.MULTILINE)}
    conf = folder / "pip.conf"
    conf.write_text("\n".join(["[global]", *(f"{name} = {value}" for name, value in settings.items()), ""]))
    arguments = ["--secret", f"id=pip.conf,src={conf}"]
    if certificates := settings.get("cert"):
        arguments += ["--volume", f"{certificates}:{certificates}:ro"]
    return arguments


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Image]:
    """The gateway's image."""
    if not shutil.which("buildah") or not (STORE / "graph").exists():
        pytest.skip("no buildah with a base image; `make test` installs both as root on Debian")
    began = time.monotonic()
    options = ["--isolation", "chroot", "--network", "host", "--format", "docker", "--pull-never", "--quiet"]
    arguments = ["--build-arg", "PYTHON_IMAGE=localhost/ergo-test-python", *pip_secrets(tmp_path_factory.mktemp("pip"))]
    name = buildah("bud", *options, *arguments, "--file", "docker/gateway.Dockerfile", ".").splitlines()[-1]
    took = time.monotonic() - began
    container = buildah("from", "--pull-never", name)
    try:
        listed = json.loads(buildah("inspect", "--type", "image", name))
        root = Path(buildah("mount", container))
        size = sum(path.lstat().st_size for path in root.rglob("*") if not path.is_symlink() and path.is_file())
        print(f"\nimage: {size / 1e6:.0f} MB, built in {took:.0f} s")
        yield Image(root, listed["Docker"]["config"], size)
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
    """The image is small, has certificates, and neither a compiler, pip, git, the sources, the tests nor the build's pip.conf."""
    programs = {path.name for folder in image.environment["PATH"].split(":") for path in (image.root / folder[1:]).glob("*")}
    assert "ergo-vqa" in programs
    assert not {name for name in programs if re.fullmatch(r"pip[\d.]*|cc|gcc.*|g\+\+.*|make|git|curl|wget", name)}
    site = next(image.root.glob("opt/ergo/lib/python3*/site-packages"))
    installed = {path.name.split("-")[0] for path in site.glob("*.dist-info")}
    assert "ergo_vqa" in installed
    assert not {"pip", "setuptools", "hatchling", "pytest", "torch"} & installed
    assert not [name for name in ("src", "wheel", "opt/pip", "etc/pip.conf", "root/.cache") if (image.root / name).exists()]
    assert (image.root / "etc/ssl/certs/ca-certificates.crt").stat().st_size > 0
    assert image.size < MOST_BYTES


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
    pid: int
    environment: dict[str, str]
    container: subprocess.Popen[bytes]
    log: Path

    def status(self, name: str) -> str:
        """Return a line of the process' status."""
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith(f"{name}:"))


@pytest.fixture
def running(image: Image, engine: str, tmp_path: Path) -> Iterator[Running]:
    """The image's gateway as the Compose file starts it, but for its address, its engine's, and the prompts: ergo-mini's."""
    key, line = new_key("somebody")
    secrets = tmp_path / "secrets"
    secrets.mkdir()
    (secrets / "api_keys").write_text(line)
    secrets.chmod(0o755)
    port = support.free_port()
    prompts = next(image.root.glob("opt/ergo/lib/python3*/site-packages/ergo_mini/prompts.toml")).relative_to(image.root)
    here = {"ERGO_HOST": "127.0.0.1", "ERGO_PORT": str(port), "ERGO_ENGINE_URL": engine, "ERGO_PROMPTS": f"/{prompts}"}
    environment = image.environment | composition(example())["services"]["gateway"]["environment"] | here
    user, group = image.config["User"].split(":")
    program = [*image.config["Entrypoint"], *image.config["Cmd"]]
    contain = ["unshare", "--mount", "--pid", "--fork", "--kill-child", f"{ROOT}/tests/deploy/contain.sh"]
    log = tmp_path / "log"
    began = time.monotonic()
    with log.open("wb") as out:
        command = [*contain, str(image.root), str(secrets), user, group, *program]
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=out)
    try:
        url = f"http://127.0.0.1:{port}"
        support.wait_until(lambda: support.answers(f"{url}/readyz") or process.poll() is not None, "the gateway is ready")
        assert process.poll() is None, log.read_text()
        took = time.monotonic() - began
        pid = int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text())
        print(f"\ngateway: ready {took:.1f} s after its start")
        yield Running(url, key, pid, environment, process, log)
    finally:
        process.kill()
        process.wait()


def test_the_image_answers_as_compose_starts_it(image: Image, running: Running) -> None:
    """Started without root, capabilities or a root that can be written, the image's gateway is healthy, answers a scene through
    an engine with the Compose file's flags for who has a key, refuses who has none, and ends on SIGTERM with status 0."""
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

    _, *check = image.config["Healthcheck"]["Test"]
    health = ["nsenter", "--target", str(running.pid), "--mount", "--root", *check]
    assert subprocess.run(health, env=running.environment, check=False, timeout=60).returncode == 0
    dead = running.environment | {"ERGO_PORT": str(support.free_port())}
    assert subprocess.run(health, env=dead, check=False, timeout=60, stderr=subprocess.DEVNULL).returncode != 0

    os.kill(running.pid, signal.SIGTERM)
    assert running.container.wait(60) == 0, running.log.read_text()
