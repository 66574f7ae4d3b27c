"""What the internet may do to a server, done to the real one: a process of its own, in front of real vLLM where an engine counts.

``make attack`` runs this; it takes minutes, and is bounded in time. What can be shown in seconds is in the other tests.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import signal
import socket
import statistics
import subprocess
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx2
import pytest
import support
from asking import Meter, data_url, picture
from hostile import IMAGES, URLS
from PIL import Image
from support import Process
from upstream import Upstream

pytestmark = pytest.mark.attack

GAUGES = (
    "ergo_requests_in_flight",
    "ergo_requests_queued",
    "ergo_body_bytes_in_flight",
    "ergo_image_memory_bytes",
    "ergo_image_threads_busy",
)
SCENE = support.held_out(7)
PHOTO = support.encode(SCENE)


def memory(process: Process) -> dict[str, int]:
    """Return a process' memory in bytes: now (VmRSS), and the most it ever had (VmHWM)."""
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith(("VmRSS", "VmHWM"))}


def behind(upstream: Upstream) -> dict[str, object]:
    """Return the settings for a server in front of an engine that is none: where only the server is tried."""
    return {"engine": "vllm", "engine_url": upstream.url, "engine_model": "m"}


def _http(server: Process) -> httpx2.Client:
    return httpx2.Client(base_url=server.url, timeout=120, trust_env=False)


def is_calm(server: Process) -> None:
    """Wait until every gauge is back at zero: nothing is left of any request."""
    meter = Meter.of(server.url)
    support.wait_until(lambda: sum(meter(name) for name in GAUGES) == 0, "all gauges are back at zero", 120)


def answers_a_scene(server: Process) -> None:
    """Ask the real question, and get the right answer."""
    response = httpx2.post(
        f"{server.url}/v1/vqa", files={"image": PHOTO}, data={"question": SCENE.question}, timeout=120, trust_env=False
    )
    assert response.json()["answer"] == SCENE.answer


async def ask(http: httpx2.AsyncClient) -> tuple[int, float]:
    """Ask the real question; returns the status, and seconds."""
    started = time.perf_counter()
    response = await http.post("/v1/vqa", files={"image": PHOTO}, data={"question": SCENE.question})
    return response.status_code, time.perf_counter() - started


# --- images and addresses -----------------------------------------------------------------------------------------------


def test_hostile_images(upstream: Upstream) -> None:
    """Each image of the table, sent as image/jpeg in every form of body, gets an error of its own or an answer, never a 500, and
    the same in each form; the memory stays within a bound; then all is calm."""
    question = {"question": "What is the code?"}
    found: Counter[int] = Counter()
    slowest = 0.0, ""
    upstream.go_on.set()
    settings = behind(upstream) | {"image_memory_bytes": 512 << 20, "image_store_tenant_bytes": 256 << 20}
    with support.process(**settings) as server, _http(server) as http:
        before = memory(server)["VmHWM"]
        for name, made in IMAGES.items():
            image = made()
            started = time.perf_counter()
            statuses = [
                http.post("/v1/vqa", params=question, content=image, headers={"content-type": "image/jpeg"}).status_code,
                http.post("/v1/vqa", data=question, files={"image": ("photo.jpg", image, "image/jpeg")}).status_code,
                http.post("/v1/vqa", json=question | {"image": data_url(image, "jpeg")}).status_code,
                http.post("/v1/vqa/estimate", json={"image": data_url(image, "jpeg")}).status_code,
                http.post("/v1/images", content=image, headers={"content-type": "image/jpeg"}).status_code,
            ]
            slowest = max(slowest, (time.perf_counter() - started, name))
            found.update(statuses)
            assert set(statuses) <= {200, 201, 413, 415, 422} | ({400} if not image else set()), (name, statuses)
            assert len(set(statuses[:3])) == 1 or not image, (name, statuses)
        grown = memory(server)["VmHWM"] - before
        print(f"{len(IMAGES)} hostile images in 5 forms: {dict(found)}; peak memory grew by {grown / 2**20:.0f} MiB")
        print(f"slowest, in all its forms: {slowest[1]}, {slowest[0]:.1f} s")
        assert grown < 1 << 30  # images and uploads as set, and 256 MiB for a body of 80 MB in base64 and all else
        is_calm(server)
        assert server.complaints() == ""
        assert http.post("/v1/vqa", data=question, files={"image": PHOTO}).json()["answer"] == "seven"


def test_hostile_addresses() -> None:
    """No address of the table is asked, though fetching is on: nothing connects to loopback, and all get the same words."""
    with socket.create_server(("127.0.0.1", 0)) as trap, support.process(fetch="public", fetch_http=True) as server:
        trap.setblocking(False)
        port = trap.getsockname()[1]
        texts: Counter[tuple[int, str]] = Counter()
        with httpx2.Client(base_url=server.url, timeout=120, trust_env=False) as http:
            for url in (*URLS, f"http://127.0.0.1:{port}/", f"http://localhost:{port}/", f"http://[::ffff:127.0.0.1]:{port}/"):
                body = json.dumps({"image": url, "question": "?"})  # a lone surrogate can only be sent escaped
                response = http.post("/v1/vqa", content=body, headers={"content-type": "application/json"})
                texts[response.status_code, response.json()["error"]["code"]] += 1
        print(f"{texts.total()} hostile addresses: {dict(texts)}")
        assert {status for status, _ in texts} <= {400, 422}
        with pytest.raises(BlockingIOError):
            trap.accept()
        is_calm(server)


def test_a_flood_of_the_largest_images_stays_within_the_memory_limit(upstream: Upstream) -> None:
    """Sixteen 100-megapixel images at a time, of every format, raise the memory by no more than what the settings allow."""
    limit, bodies = 512 << 20, 256 << 20
    forms = {
        "JPEG": {"quality": 85},
        "progressive": {"quality": 85, "progressive": True},
        "PNG": {"compress_level": 1},
        "WEBP": {"lossless": True, "method": 0},
    }
    whole = Image.effect_noise((1250, 1000), 60).convert("RGB").resize((12500, 8000), Image.Resampling.NEAREST)
    images = []
    for name, options in forms.items():
        with io.BytesIO() as file:
            whole.save(file, "JPEG" if name == "progressive" else name, **options)
            images.append(file.getvalue())
    upstream.go_on.set()
    settings = {"image_memory_bytes": limit, "max_bytes_in_flight": bodies, "max_body_bytes": bodies}
    with support.process(**behind(upstream), **settings) as server, _http(server) as http:
        asks = {"params": {"question": "?"}, "headers": {"content-type": "image/jpeg"}}
        assert http.post("/v1/vqa", content=PHOTO, **asks).status_code == 200  # type: ignore[arg-type]
        before = memory(server)["VmRSS"]

        async def flood() -> Counter[int]:
            async with httpx2.AsyncClient(base_url=server.url, timeout=600, trust_env=False) as http:
                asked = [
                    http.post("/v1/vqa", params={"question": "?"}, content=images[n % 4], headers={"content-type": "image/*"})
                    for n in range(16)
                ]
                return Counter([response.status_code for response in await asyncio.gather(*asked)])

        statuses = asyncio.run(flood())
        grown = memory(server)["VmHWM"] - before
        sizes = [f"{len(image) / 1e6:.0f}" for image in images]
        print(f"16 images of 100 MP ({', '.join(sizes)} MB): {dict(statuses)}; memory grew by {grown / 2**20:.0f} MiB")
        assert set(statuses) <= {200, 413, 503}  # a lossless WebP of that size needs more than the limit, and is told so
        assert statuses[200] > 0
        assert grown < limit + bodies + (256 << 20)  # what Python, libvips and the engine keep for themselves
        is_calm(server)


# --- slow and broken connections ------------------------------------------------------------------------------------------


def test_slow_senders_do_not_keep_others_out() -> None:
    """With hundreds of connections that drip, or say nothing, a real question is answered; then they are all cut off."""
    settings = {"head_seconds": 3, "body_stall_seconds": 3, "max_connections": 400, "max_concurrent": 64}
    with support.process(**settings) as server, contextlib.ExitStack() as opened:
        head = b"POST /v1/vqa?question=x HTTP/1.1\r\nhost: x\r\ncontent-type: image/png\r\n"
        beginnings = [
            b"",
            b"POST /v1",
            head,
            head + b"content-length: 100000\r\n\r\nxx",
            head + b"transfer-encoding: chunked\r\n\r\n2\r\nxx",
        ]
        drips = []
        for number in range(200):
            drip = opened.enter_context(socket.create_connection(server.address))
            drip.sendall(beginnings[number % len(beginnings)])
            drips.append(drip)
        started = time.perf_counter()
        answers_a_scene(server)
        took = time.perf_counter() - started

        def cut(drip: socket.socket) -> bool:
            drip.settimeout(120)
            try:
                while drip.recv(65536):
                    pass
            except ConnectionError:
                pass
            return True

        assert all(cut(drip) for drip in drips)
        print(f"{len(drips)} slow senders: a question among them took {took:.2f} s; all were cut off")
        is_calm(server)
        answers_a_scene(server)


# --- too much, and an engine that fails -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def own_vllm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmProcess]:
    """Real vLLM that may be stopped, killed and started again."""
    if reason := support.why_no_vllm():
        pytest.skip(reason)
    engine = VllmProcess(tmp_path_factory.mktemp("vllm") / "log")
    try:
        yield engine
    finally:
        engine.stop()


class VllmProcess:
    """vLLM on a port that stays the same."""

    def __init__(self, log: Path) -> None:
        self.port, self.log = support.free_port(), log
        self.url = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        """Start it, and wait until it answers."""
        self.running: subprocess.Popen[bytes] = support.start_vllm(self.port, self.log)
        support.wait_until(lambda: support.answers(f"{self.url}/health"), "vLLM has started")

    def signal(self, which: signal.Signals) -> None:
        """Send a signal to it and to what it started."""
        os.killpg(self.running.pid, which)

    def kill(self) -> None:
        """Kill it."""
        self.signal(signal.SIGKILL)
        self.running.wait()

    def stop(self) -> None:
        """End it."""
        with contextlib.suppress(ProcessLookupError):
            self.signal(signal.SIGCONT)
            support.stop(self.running)


PLACES = 8


def test_three_times_too_much(own_vllm: VllmProcess) -> None:
    """At three times the rate that fills the server, who gets in is answered within 1.5 times the usual, and the rest at once.

    Usual: the same number of questions at a time, none of which has to wait. Both in one run, on the same server. One may wait,
    so that the queue is used; for an eighth of a question on average, as there are eight places.
    """
    settings = {"engine": "vllm", "engine_url": own_vllm.url, "max_concurrent": PLACES, "max_queued": 1, "queue_seconds": 5}
    count = 60
    with support.process(**settings) as server:
        answers_a_scene(server)

        async def usual() -> tuple[list[float], float]:
            async with _client(server) as http:
                started = time.perf_counter()
                times: list[float] = []

                async def one_after_the_other() -> None:
                    for _ in range(count // PLACES):
                        status, seconds = await ask(http)
                        assert status == 200
                        times.append(seconds)

                await asyncio.gather(*(one_after_the_other() for _ in range(PLACES)))
                return times, len(times) / (time.perf_counter() - started)

        async def too_much(rate: float) -> list[tuple[int, float]]:
            async with _client(server) as http:
                asked = []
                for _ in range(3 * count):
                    asked.append(asyncio.create_task(ask(http)))
                    await asyncio.sleep(1 / rate)
                return await asyncio.gather(*asked)

        before, rate = asyncio.run(usual())
        found = asyncio.run(too_much(3 * rate))
        accepted = [seconds for status, seconds in found if status == 200]
        refused = [seconds for status, seconds in found if status == 503]
        ratio = statistics.median(accepted) / statistics.median(before)
        print(f"capacity {rate:.1f} a second; at three times that {len(accepted)} answered, {len(refused)} refused")
        print(f"median of those answered ÷ usual median: {ratio:.2f}")
        print(f"median of those refused ÷ usual median: {statistics.median(refused) / statistics.median(before):.3f}")
        assert len(accepted) + len(refused) == len(found)
        assert len(accepted) >= count // 2
        assert ratio <= 1.5
        assert statistics.median(refused) < statistics.median(before) / 4
        is_calm(server)


@contextlib.asynccontextmanager
async def _client(server: Process) -> AsyncIterator[httpx2.AsyncClient]:
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=64)
    async with httpx2.AsyncClient(base_url=server.url, timeout=120, trust_env=False, limits=limits) as http:
        yield http


def test_an_engine_that_stops_is_killed_and_comes_back(own_vllm: VllmProcess) -> None:
    """Under load vLLM is frozen, thawed, killed and started again: every question ends, none with a 500, and both times the
    server answers again without being touched."""
    settings = {"engine": "vllm", "engine_url": own_vllm.url, "turn_seconds": 3, "breaker_seconds": 2, "max_concurrent": 8}
    found: Counter[str] = Counter()
    stopping = threading.Event()

    with support.process(**settings) as server, httpx2.Client(base_url=server.url, timeout=120, trust_env=False) as http:
        answers_a_scene(server)

        def load() -> None:
            while not stopping.is_set():
                response = http.post("/v1/vqa", files={"image": PHOTO}, data={"question": SCENE.question})
                found[str(response.status_code) if response.status_code == 200 else response.json()["error"]["code"]] += 1
                if response.status_code != 200:
                    stopping.wait(0.2)

        def until(what: str, *codes: str) -> None:
            had = sum(found[code] for code in codes)
            support.wait_until(lambda: sum(found[code] for code in codes) > had + 3, what, 120)

        threads = [threading.Thread(target=load) for _ in range(4)]
        for thread in threads:
            thread.start()
        try:
            until("questions are answered", "200")
            own_vllm.signal(signal.SIGSTOP)
            until("the frozen engine is noticed", "engine_timeout", "engine_unavailable")
            own_vllm.signal(signal.SIGCONT)
            until("the thawed engine answers", "200")
            own_vllm.kill()
            until("the killed engine is noticed", "engine_unavailable")
            own_vllm.start()
            until("the new engine answers", "200")
        finally:
            stopping.set()
            for thread in threads:
                thread.join()
        print(f"frozen, thawed, killed, started again: {dict(found)}")
        assert set(found) <= {"200", "engine_timeout", "engine_unavailable", "engine_failed"}
        is_calm(server)
        answers_a_scene(server)


def test_the_largest_picture_of_nothing_is_cheap(upstream: Upstream) -> None:
    """A plain image of the largest size is answered like any other."""
    upstream.go_on.set()
    with support.process(**behind(upstream)) as server, _http(server) as http:
        asks = {"params": {"question": "?"}, "headers": {"content-type": "image/png"}}
        assert http.post("/v1/vqa", content=picture(12000, 10600), **asks).status_code == 200  # type: ignore[arg-type]
        is_calm(server)
