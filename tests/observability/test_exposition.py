"""What Prometheus' own linter thinks of ``/metrics``."""

from __future__ import annotations

import shutil
import subprocess

import pytest
from asking import client, vqa


def test_promtool_finds_nothing_to_complain_of() -> None:
    """``promtool check metrics`` reads the exposition of a server that has answered, and has nothing to say."""
    program = shutil.which("promtool")
    if program is None:
        pytest.skip("no promtool here: tests/observability/install.sh installs it")
    http = client()
    vqa(http)
    exposed = http.get("/metrics").content
    done = subprocess.run([program, "check", "metrics"], input=exposed, capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
