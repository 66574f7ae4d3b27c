"""Real parts, started once: the gateway on the embedded engine, vLLM, and the gateway on vLLM."""

from __future__ import annotations

import os
import threading
from collections.abc import Generator, Iterator

import pytest
import support
from upstream import Upstream


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Where every part must be present (ERGO_TEST_ALL, set by .ci/run), a skipped test is a failure."""
    report = yield
    if os.environ.get("ERGO_TEST_ALL") and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped, although every part must be present: {report.longrepr}"
    return report


@pytest.fixture(scope="session")
def embedded() -> Iterator[str]:
    """URL of the gateway with ergo-mini in its own process' memory."""
    with support.gateway(prompts=None) as url:
        yield url


@pytest.fixture(scope="session")
def vllm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of real vLLM that serves ergo-mini on the CPU."""
    if reason := support.why_no_vllm():
        pytest.skip(reason)
    with support.vllm(tmp_path_factory.mktemp("vllm") / "log") as url:
        yield url


@pytest.fixture(scope="session")
def on_vllm(vllm: str) -> Iterator[str]:
    """URL of the gateway whose engine is real vLLM."""
    with support.gateway(engine="vllm", engine_url=vllm) as url:
        yield url


@pytest.fixture(params=["embedded", pytest.param("on_vllm", marks=pytest.mark.vllm)])
def real(request: pytest.FixtureRequest) -> str:
    """URL of a gateway, on each of the two real engines in turn."""
    url: str = request.getfixturevalue(request.param)
    return url


@pytest.fixture
def upstream() -> Iterator[Upstream]:
    """An engine."""
    with Upstream() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.go_on.set()
            server.shutdown()
            thread.join()
