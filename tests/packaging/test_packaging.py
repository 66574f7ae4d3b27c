"""What users install."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from support import CHECKPOINT, ROOT

import ergo_client
from ergo_server.api.playground import FOLDER
from ergo_server.settings import Settings


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel, built from the working tree."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        str(folder),
        str(ROOT),
    ]
    subprocess.run(command, check=True)
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


def test_the_wheel_holds_every_package_and_its_data(wheel: zipfile.ZipFile) -> None:
    """Server, client, training, checkpoint, prompts, page and type markers are all in the wheel."""
    names = set(wheel.namelist())
    assert {
        "ergo_server/__main__.py",
        "ergo_server/protocol/prompts/ergo.toml",
        "ergo_server/api/playground/index.html",
        *(f"ergo_server/api/playground/static/{path.name}" for path in (FOLDER / "static").iterdir()),
        "ergo_server/py.typed",
        "ergo_client/py.typed",
        "ergo_train/scenes.py",
        "ergo_mini/prompts.toml",
        "ergo_mini/MODEL_CARD.md",
        "ergo_mini/checkpoint/model.safetensors",
        "ergo_mini/checkpoint/chat_template.jinja",
    } <= names


def test_the_plain_install_is_light(wheel: zipfile.ZipFile) -> None:
    """Without extras the distribution asks for httpx2 alone."""
    (metadata,) = (name for name in wheel.namelist() if name.endswith("METADATA"))
    asked = re.findall(r"^Requires-Dist: (.*)$", wheel.read(metadata).decode(), re.MULTILINE)
    assert [line.split(">")[0] for line in asked if "extra ==" not in line] == ["httpx2"]


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("ergo_client", ["ergo_server", "fastapi", "pydantic", "PIL"]),
        ("ergo_server", ["fastapi", "torch"]),
        ("ergo_server.api.app", ["torch"]),
    ],
)
def test_an_import_is_light(module: str, absent: list[str]) -> None:
    """Importing the client loads no server; importing the server, and even its app, loads no torch."""
    code = f"import sys, {module}; print([name for name in {absent} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_the_checkpoint_is_small() -> None:
    """ergo-mini is at most 12 MB."""
    assert sum(path.stat().st_size for path in CHECKPOINT.rglob("*")) <= 12_000_000


def test_exported_names_are_sorted() -> None:
    """The client's public names are listed, in order."""
    assert ergo_client.__all__ == sorted(ergo_client.__all__)


def test_every_version_is_pinned() -> None:
    """constraints.txt holds exact versions only, without a path or a build."""
    lines = [line for line in Path(ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9A-Za-z.]+", line) for line in lines)


def test_the_configuration_page_is_up_to_date() -> None:
    """Running docs/settings.py again would change nothing, so every setting is there with the default that it has."""
    made = runpy.run_path(str(ROOT / "docs" / "settings.py"))["page"]()
    assert (ROOT / "docs" / "configuration.md").read_text() == made
    assert all(f"`ERGO_{name.upper()}`" in made for name in Settings.model_fields)
