"""From the settings to the engines: addresses, secrets in files, and what has one session."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
from collections.abc import Iterator
from pathlib import Path
from threading import Thread

import httpx2
import pytest
import shell
import support
from asking import Meter, chat, client, encoded, picture, says, scripted, vqa
from pydantic import ValidationError
from upstream import Upstream

from ergo_server.api.keys import new_key
from ergo_server.engine.scripted import ScriptedEngine


@contextlib.contextmanager
def answering() -> Iterator[Upstream]:
    """An engine that does not wait to be told."""
    with Upstream() as engine:
        engine.go_on.set()
        thread = Thread(target=engine.serve_forever)
        thread.start()
        try:
            yield engine
        finally:
            engine.shutdown()
            thread.join()


def ask(url: str, photo: bytes, **headers: str) -> httpx2.Response:
    """Ask a question."""
    body = {"image": {"data": encoded(photo)}, "question": "What is written there?"}
    return httpx2.post(f"{url}/v1/vqa", json=body, headers=headers, trust_env=False, timeout=60)


def photos(count: int) -> list[bytes]:
    """Return images that differ in their overviews, too."""
    return [support.encode(support.held_out(800 + number, size=(800, 600))) for number in range(count)]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("engine:8001", "engine_url must be"),
        ("http://", "engine_url must be"),
        ("http://a:8001,", "engine_url must be"),
        ("ftp://a:8001", "engine_url must be"),
        ("http://a:8001,http://a:8001/", "engine_url names an engine twice"),
        ("http://u:p@a:8001,http://a:8001", "engine_url names an engine twice"),
    ],
)
def test_addresses_that_cannot_be_used_are_named(given: str, message: str) -> None:
    """An address without scheme or host, an empty one, and one that is there twice, with a password or not, are refused."""
    with pytest.raises(ValidationError, match=message):
        support.mini_settings(engine="vllm", engine_url=given)


def test_several_addresses_have_commas_between() -> None:
    """Blanks and slashes at their ends do not matter."""
    assert support.mini_settings(engine_url="http://a:8001/ , https://b/x").engine_urls == ("http://a:8001", "https://b/x")


def test_two_engines_share_the_images_and_each_keeps_its_own() -> None:
    """Of sixteen images each has one engine for all its questions; both engines are seen in the metrics by their addresses."""
    with (
        answering() as one,
        answering() as two,
        support.gateway(engine="vllm", engine_model="m", engine_url=f"{one.url},{two.url}") as url,
    ):
        for photo in photos(16) * 2:
            assert ask(url, photo).status_code == 200
        mine, others = ({headers["x-session-id"] for headers in engine.headers} for engine in (one, two))
        assert not mine & others
        assert len(mine | others) == 16
        assert mine
        assert others
        assert one.asked + two.asked == 64
        meter = Meter.of(url)
        for engine in (one, two):
            address = engine.url.removeprefix("http://")
            assert meter("ergo_engine_ready", engine=address) == 1
            assert meter("ergo_circuit_breaker_state", engine=address, state="closed") == 1
        assert meter("ergo_engine_failovers_total") == 0


def test_an_engine_that_is_not_there_costs_nobody_an_answer() -> None:
    """One of two addresses is nobody's: all is answered by the other, and counted where it was tried."""
    gone = f"http://127.0.0.1:{support.free_port()}"
    with (
        answering() as there,
        support.gateway(engine="vllm", engine_model="m", engine_url=f"{gone},{there.url}", engine_check_seconds=600) as url,
    ):
        assert [ask(url, photo).status_code for photo in photos(16)] == [200] * 16
        meter = Meter.of(url)
        assert meter("ergo_engine_failovers_total", reason="unavailable") > 0
        assert meter("ergo_engine_requests_total", outcome="ok") == 32
        detail = httpx2.get(f"{url}/readyz", trust_env=False).json()["detail"]
        assert detail == "1 of 2 engines are ready"
        assert "127" not in detail


def sessions(scope: str = "image", secret: str = "s", tenants: int = 0) -> list[str]:
    """Return the sessions of two questions about each of two images, of each tenant in turn."""
    engine: ScriptedEngine = scripted()
    keys = [new_key(f"tenant-{number}") for number in range(tenants)]
    given = {"api_keys": ";".join(line for _, line in keys)} if keys else {}
    http = client(engine, session_scope=scope, session_secret=secret, **given)
    for key, _ in keys or [("", "")]:
        http.headers["authorization"] = f"Bearer {key}"
        for photo in photos(2) * 2:
            assert vqa(http, photo).status_code == 200
    return [session for _, _, session in engine.calls]


def test_a_session_is_a_tenant_and_an_image() -> None:
    """All turns about an image share a session, another image has another, another tenant others; the secret decides which."""
    first, again, second, also, *rest = sessions()
    assert first == again != second == also
    assert rest == [first, first, second, second]
    assert sessions() == [first, first, second, second] * 2
    assert not {first, second} & set(sessions(secret="t"))
    of_tenants = sessions(tenants=2)
    assert len(set(of_tenants[:8])) == len(set(of_tenants[8:])) == 2
    assert not set(of_tenants[:8]) & set(of_tenants[8:])


SPECK = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAADgAAAA4AQAAAACA/QazAAAADklEQVR42mNgGAVDGQAAAcAAAb8Xq8EAAAAASUVORK5CYII=")
"""A PNG of 56 × 56 black pixels."""


@pytest.mark.parametrize(
    ("tenant", "session"),
    [
        ("", "a7e66a747f799aeb90e8b03043a036b734b4534b0f41e264eef39a2ef45f1204"),
        ("alice", "e783152358758e752585996ea866dabc39a8652e19eb46b6609840a7fd1e590d"),
    ],
)
def test_the_session_key_is_the_documented_one(tenant: str, session: str) -> None:
    """HMAC-SHA256(session secret, tenant ‖ SHA-256 of the view's bytes), so that gateways of several versions agree.

    The figures are openssl's: ``(printf alice; openssl dgst -sha256 -binary speck.png) | openssl dgst -sha256 -hmac "the session
    secret"``. `ergo-raw` is asked, as it passes an image's bytes on; who is nobody in particular is ``anonymous``.
    """
    engine = scripted()
    key, line = new_key(tenant) if tenant else ("", "")
    given = {"api_keys": line} if tenant else {}
    http = client(engine, session_secret="the session secret", **given)
    http.headers["authorization"] = f"Bearer {key}"
    assert chat(http, says(SPECK, "What is it?"), model="ergo-raw").status_code == 200
    ((conversation, _, sent),) = engine.calls
    assert [view.data for view in conversation.views] == [SPECK]
    assert sent == session


def test_both_turns_carry_the_key_of_the_overview() -> None:
    """The key is made of the bytes of the first view that the engine is sent, and the answer turn's is the zoom turn's."""
    engine = scripted()
    assert vqa(client(engine, session_secret="s"), photos(1)[0]).status_code == 200
    zoom, answer = engine.calls
    overview = next(zoom[0].views).data
    assert len(list(answer[0].views)) == 2
    expected = hmac.digest(b"s", b"anonymous" + hashlib.sha256(overview).digest(), "sha256").hex()
    assert (zoom[2], answer[2]) == (expected, expected)


def test_a_session_can_be_a_question() -> None:
    """With session_scope=request both turns of a question share a session, and the next question has another."""
    found = sessions("request")
    assert found[0::2] == found[1::2]
    assert len(set(found)) == 4


def test_secrets_may_come_from_files(tmp_path: Path) -> None:
    """The engine's key and the session secret work from files as from the environment, a line's end excepted."""
    (tmp_path / "key").write_text("sesame\n")
    (tmp_path / "secret").write_text("s\n")
    with answering() as engine:
        for given in (
            {"engine_api_key": "sesame", "session_secret": "s"},
            {"engine_api_key_file": tmp_path / "key", "session_secret_file": tmp_path / "secret"},
        ):
            with support.gateway(engine="vllm", engine_model="m", engine_url=engine.url, **given) as url:
                assert ask(url, picture()).status_code == 200
        assert {headers["authorization"] for headers in engine.headers} == {"Bearer sesame"}
        assert len({headers["x-session-id"] for headers in engine.headers}) == 1


@pytest.mark.parametrize("name", ["engine_api_key", "session_secret"])
def test_a_secret_is_given_once(name: str, tmp_path: Path) -> None:
    """A secret and a file with it at the same time are refused; a file that is not there is named."""
    with pytest.raises(ValidationError, match=f"{name} and {name}_file are both given"):
        support.mini_settings(**{name: "x", f"{name}_file": tmp_path / "x"})
    given: dict[str, object] = {f"{name}_file": tmp_path / "missing"}
    with pytest.raises(FileNotFoundError, match="missing"):
        support.app(None, engine="vllm", **given)


def test_the_server_says_which_file_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command ends with status 1 and names the file."""
    monkeypatch.setenv("ERGO_SESSION_SECRET_FILE", str(tmp_path / "missing"))
    said = shell.run("", "serve", "--port", "0")
    assert said.returncode == 1
    assert said.stderr.startswith("ergo-vqa: ")
    assert str(tmp_path / "missing") in said.stderr
