"""A real Prometheus that scrapes servers on this machine every second."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest
import support

SCRAPE_SECONDS = 1
"""Fifteen times as often as deployed, so that a minute here has as many samples as a quarter of an hour there."""


@dataclass(frozen=True, slots=True)
class Target:
    """What is scraped."""

    job: str
    url: str


@dataclass(frozen=True, slots=True)
class Prometheus:
    """A running one."""

    url: str

    def get(self, path: str, **parameters: Any) -> Any:
        """Ask its HTTP interface; fails with its own words where it refuses."""
        body = httpx2.get(f"{self.url}/api/v1/{path}", params=parameters, trust_env=False, timeout=60).json()
        assert body["status"] == "success", f"{parameters}: {body.get('error')}"
        return body["data"]

    def query(self, expression: str, at: float | None = None) -> list[dict[str, Any]]:
        """Return the series that an expression gives at a moment, now by default."""
        data = self.get("query", query=expression, **({"time": at} if at else {}))
        if data["resultType"] == "scalar":
            return [{"metric": {}, "value": data["result"]}]
        found: list[dict[str, Any]] = data["result"]
        return found

    def value(self, expression: str, at: float | None = None) -> float:
        """Return the one number that an expression gives."""
        (series,) = self.query(expression, at)
        return float(series["value"][1])

    def range(self, expression: str, start: float, end: float, step: float = SCRAPE_SECONDS) -> list[dict[str, Any]]:
        """Return the series that an expression gives over time."""
        found: list[dict[str, Any]] = self.get("query_range", query=expression, start=start, end=end, step=step)["result"]
        return found

    def wait_for_scrape(self) -> float:
        """Wait until every target was scraped twice after now, so that all that has happened is known; returns the time then."""
        now = time.time()
        oldest = "min(timestamp(up))"
        support.wait_until(lambda: self.value(oldest) > now + SCRAPE_SECONDS, "all targets were scraped again")
        return time.time()


@contextlib.contextmanager
def prometheus(folder: Path, targets: Sequence[Target], rules: Sequence[Path] = ()) -> Iterator[Prometheus]:
    """Start one that scrapes ``targets`` and evaluates ``rules``; skips the test where the program is not there."""
    program = shutil.which("prometheus")
    if program is None:
        pytest.skip("no prometheus here: tests/observability/install.sh installs it")
    port = support.free_port()
    lines = ["global:", f"  scrape_interval: {SCRAPE_SECONDS}s", f"  evaluation_interval: {SCRAPE_SECONDS}s", "rule_files:"]
    lines += [f"  - {rule}" for rule in rules]
    lines += ["scrape_configs:"]
    for job in dict.fromkeys(target.job for target in targets):
        addresses = [target.url.removeprefix("http://") for target in targets if target.job == job]
        lines += [f"  - job_name: {job}", f"    static_configs: [{{targets: {addresses}}}]"]
    config = folder / "prometheus.yml"
    config.write_text("\n".join(lines) + "\n")
    command = [
        program,
        f"--config.file={config}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    log = folder / "prometheus.log"
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True)
    try:
        running = Prometheus(f"http://127.0.0.1:{port}")
        support.wait_until(lambda: support.answers(f"{running.url}/-/ready") or process.poll() is not None, "Prometheus is ready")
        assert process.poll() is None, log.read_text()
        support.wait_until(lambda: len(running.query("up == 1")) == len(targets), "every target is scraped")
        yield running
    finally:
        support.stop(process)
