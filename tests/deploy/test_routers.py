"""A router that others made, between the gateway and two engines: what is about one image stays on one engine."""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx2
import pytest
import support
from charts import RECIPES, Resource, one, render
from PIL import Image
from support import ROOT
from upstream import Upstream

ROUTER = ROOT / ".cache" / "routers" / "bin" / "vllm-router"

pytestmark = pytest.mark.skipif(
    not ROUTER.exists(), reason="no vllm-router here: tests/deploy/routers.sh .cache/routers installs it"
)

OF_THE_CLUSTER = ("--host", "--port", "--prometheus", "--service-discovery", "--selector", "app.kubernetes.io/")
"""Arguments of the recipe that have to do with where it runs, and not with how it chooses."""


def container() -> Resource:
    """Return vllm-router's container in the recipe."""
    found: Resource = one(render({}, RECIPES / "vllm-router"), "Deployment")["spec"]["template"]["spec"]["containers"][0]
    return found


def recipe() -> list[str]:
    """Return vllm-router's arguments there."""
    args: list[str] = container()["args"]
    return args


@contextlib.contextmanager
def engine() -> Iterator[Upstream]:
    """Serve an engine that answers at once."""
    with Upstream() as server:
        server.go_on.set()
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@contextlib.contextmanager
def routed(log: Path, *engines: Upstream) -> Iterator[str]:
    """Run the gateway behind the router that the recipe describes, before these engines; yields the gateway's URL."""
    port = support.free_port()
    command = [str(ROUTER), "--host=127.0.0.1", f"--port={port}", f"--prometheus-port={support.free_port()}"]
    command += [argument for argument in recipe() if not argument.startswith(OF_THE_CLUSTER)]
    command += ["--worker-startup-check-interval=1", "--worker-urls", *(engine.url for engine in engines)]
    environment = os.environ | {variable["name"]: variable["value"] for variable in container()["env"]}
    with log.open("wb") as out, subprocess.Popen(command, env=environment, stdout=out, stderr=out) as process:
        try:
            url = f"http://127.0.0.1:{port}"
            support.wait_until(lambda: support.answers(f"{url}/health"), "the router is ready")
            with support.gateway(engine="vllm", engine_url=url, engine_model="ergo") as gateway:
                yield gateway
        finally:
            process.terminate()


def ask(gateway: str, number: int) -> int:
    """Ask about an image; returns the status."""
    with io.BytesIO() as file:
        Image.new("RGB", (400, 300), (number * 5, 9, 9)).save(file, "PNG")
        sent = httpx2.post(
            f"{gateway}/v1/vqa", files={"image": file.getvalue()}, data={"question": "What?"}, trust_env=False, timeout=60
        )
    return sent.status_code


def test_vllm_router_knows_every_flag() -> None:
    """Every flag of the recipe is one of the real router's."""
    told = subprocess.run([ROUTER, "--help"], capture_output=True, text=True, check=True).stdout
    flags = {argument.partition("=")[0] for argument in recipe() if argument.startswith("--")}
    assert len(flags) > 9
    assert not [flag for flag in flags if not re.search(rf"^\s+(--\S+, )*{flag}\b", told, re.MULTILINE)]


def test_an_image_has_one_engine(tmp_path: Path) -> None:
    """Both turns of two questions about each of 50 images reach one engine, each image the same; and both engines get images."""
    with ExitStack() as stack:
        engines = [stack.enter_context(engine()) for _ in range(2)]
        gateway = stack.enter_context(routed(tmp_path / "log", *engines))
        assert {ask(gateway, number) for number in range(50) for _ in range(2)} == {200}
        sessions = [Counter(headers["x-session-id"] for headers in engine.headers) for engine in engines]
        assert not sessions[0].keys() & sessions[1].keys()
        assert set((sessions[0] + sessions[1]).values()) == {4}
        assert min(len(found) for found in sessions) > 2
    # As the recipe sets it up, it does not write the keys to its log.
    said = (tmp_path / "log").read_text()
    assert not any(key in said for found in sessions for key in found)


def test_another_engine_stands_in(tmp_path: Path) -> None:
    """When an engine is gone, its images are answered by the other; nobody gets an error."""
    with ExitStack() as stack:
        stays = stack.enter_context(engine())
        with engine() as goes:
            gateway = stack.enter_context(routed(tmp_path / "log", stays, goes))
            assert {ask(gateway, number) for number in range(20)} == {200}
            assert goes.headers
        assert {ask(gateway, number) for number in range(20)} == {200}
