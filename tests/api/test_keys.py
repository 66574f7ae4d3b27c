"""API keys: who is let in, how keys are told to the server, and how they are replaced while it runs."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest
import support
from asking import Meter, client, error, scripted, vqa
from hypothesis import given
from hypothesis import strategies as st
from starlette.testclient import TestClient

from ergo_server.api.keys import ANONYMOUS, Keys, KeysError, Limits, Tenant, bearer, new_key, salt

ALICE, BOB, CAROL = b"ergo-alice", b"ergo-bob", b"ergo-carol"


def line(name: str, key: bytes, limits: str = "") -> str:
    """Return the line that makes a key known."""
    return f"{name} {hashlib.sha256(key).hexdigest()} {limits}\n"


BOTH = line("alice", ALICE) + line("bob", BOB)


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def write(file: Path, text: str) -> None:
    """Put another file in the place of one, as editors and Kubernetes do: never half-written, always another inode."""
    new = file.with_suffix(".new")
    new.write_text(text)
    os.replace(new, file)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file with the keys of alice and bob."""
    path = tmp_path / "keys"
    path.write_text(BOTH)
    return path


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """The result of each constant-time comparison."""
    results = []
    real: Callable[[bytes, bytes], bool] = hmac.compare_digest

    def counting(a: bytes, b: bytes) -> bool:
        results.append(real(a, b))
        return results[-1]

    monkeypatch.setattr(hmac, "compare_digest", counting)
    return results


# --- which key is whose -------------------------------------------------------------------------------------------------


def test_a_key_names_its_tenant() -> None:
    """Each key belongs to the tenant of its line, several may be one tenant's, and others are nobody's."""
    keys = Keys(BOTH + line("alice", CAROL))
    found = [keys.tenant(key) for key in (ALICE, BOB, CAROL, b"ergo-other", b"")]
    assert [tenant and tenant.name for tenant in found] == ["alice", "bob", "alice", None, None]


@pytest.mark.parametrize(
    "key", [b"ergo-0", b"ergo-50", b"ergo-99", b"ergo-none", b"", b"x" * 60_000], ids=lambda key: key[:9].decode()
)
def test_every_key_is_compared(key: bytes, compared: list[bool]) -> None:
    """All keys are compared, by the comparison whose time tells nothing, wherever the right one stands, and if there is none."""
    Keys("".join(line(f"tenant-{n}", b"ergo-%d" % n) for n in range(100))).tenant(key)
    assert len(compared) == 100
    assert sum(compared) == (key in (b"ergo-0", b"ergo-50", b"ergo-99"))


def test_only_digests_are_held() -> None:
    """What the object holds tells no key, were it printed or dumped."""
    key, its_line = new_key("alice")
    keys = Keys(its_line)
    assert keys.tenant(key.encode()) == Tenant("alice", Limits())
    assert key not in repr(vars(keys))


def test_without_keys_everybody_is_anonymous() -> None:
    """Where none is configured, no key is asked for, and one that is brought all the same does no harm."""
    assert [Keys("").tenant(key) for key in (b"", b"none")] == [ANONYMOUS, ANONYMOUS]


@pytest.mark.parametrize(
    ("headers", "key"),
    [
        ([(b"authorization", b"Bearer ergo-x")], b"ergo-x"),
        ([(b"authorization", b"bearer   ergo-x ")], b"ergo-x"),
        ([(b"authorization", b"BEARER ergo-x"), (b"host", b"x")], b"ergo-x"),
        ([(b"authorization", b"Basic ergo-x")], b""),
        ([(b"authorization", b"ergo-x")], b""),
        ([(b"authorization", b"Bearer")], b""),
        ([(b"authorization", b"Bearer ergo-x"), (b"authorization", b"Bearer ergo-y")], b""),
        ([(b"x-api-key", b"ergo-x")], b""),
        ([], b""),
    ],
)
def test_where_the_key_is_looked_for(headers: list[tuple[bytes, bytes]], key: bytes) -> None:
    """The key is the bearer token of the one Authorization header, and stands nowhere else."""
    assert bearer(headers) == key


# --- the form of the file -----------------------------------------------------------------------------------------------


def test_limits_belong_to_the_tenant() -> None:
    """Limits stand on any line of a tenant; what no line names is the server's default, and 0 is no limit."""
    text = line("alice", ALICE, "requests_per_minute=7 visual_tokens_per_minute=0") + line("alice", BOB) + line("carol", CAROL)
    keys = Keys(text, defaults=Limits(60, 8, 1000))
    alice = Tenant("alice", Limits(7, 8, 0))
    assert [keys.tenant(key) for key in (ALICE, BOB, CAROL)] == [alice, alice, Tenant("carol", Limits(60, 8, 1000))]


def test_comments_and_blank_lines() -> None:
    """Comments, blank lines, tabs, capitals, a byte order mark and Windows' line ends are nothing; ``;`` ends a line, too."""
    digest = hashlib.sha256(ALICE).hexdigest()
    text = f"# keys\n\n\talice\t{digest.upper()} # hers\r\n; bob {hashlib.sha256(BOB).hexdigest()};"
    keys = Keys(text)
    assert [keys.tenant(key) and True for key in (ALICE, BOB)] == [True, True]


def test_file_and_environment_add_up(file: Path) -> None:
    """Keys of the environment are known beside those of the file, which may begin with a byte order mark."""
    file.write_bytes(b"\xef\xbb\xbf" + BOTH.encode())
    keys = Keys(line("carol", CAROL), file)
    assert all(keys.tenant(key) for key in (ALICE, BOB, CAROL))


SECRET = "ergo-Zm9vYmFyYmF6"
WRONG = {
    "only a name": (f"{SECRET}\n", 1),
    "the key in the digest's place": (f"alice {SECRET}\n", 1),
    "the key in the name's place": (f"{SECRET}! {'0' * 64}\n", 1),
    "63 digits": (BOTH + f"carol {'0' * 63}\n", 3),
    "no digits": (f"carol {'g' * 64}\n", 1),
    "an unknown limit": (BOTH + f"\ncarol {'0' * 64} {SECRET}=3\n", 4),
    "a limit that is no number": (line("alice", ALICE, f"requests_per_minute={SECRET}"), 1),
    "a negative limit": (line("alice", ALICE, "requests_per_minute=-1"), 1),
    "a limit without a number": (line("alice", ALICE, "requests_per_minute"), 1),
    "a limit in other digits": (line("alice", ALICE, "requests_per_minute=٣"), 1),
    "a limit twice": (line("alice", ALICE, "requests_per_minute=1 requests_per_minute=1"), 1),
    "a key twice": (BOTH + line("carol", ALICE), 3),
    "limits that contradict": (
        BOTH + line("alice", CAROL, "concurrent_requests=1") + line("alice", b"d", "concurrent_requests=2"),
        4,
    ),
    "a reserved name": (line("anonymous", ALICE), 1),
    "a name with a slash": (line("a/b", ALICE), 1),
    "a name that is too long": (line("a" * 65, ALICE), 1),
}


@pytest.mark.parametrize("from_file", [True, False], ids=["file", "environment"])
@pytest.mark.parametrize(("text", "number"), WRONG.values(), ids=WRONG)
def test_a_malformed_line_is_named_and_not_shown(text: str, number: int, from_file: bool, tmp_path: Path) -> None:
    """The error names source and line, and repeats nothing of it: who mixes up the words writes the key there."""
    path = tmp_path / "keys"
    path.write_text(text)
    with pytest.raises(KeysError) as caught:
        Keys("", path) if from_file else Keys(text)
    source = str(path) if from_file else "ERGO_API_KEYS"
    assert str(caught.value).startswith(f"{source}, line {number}: ")
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    "content", [b"", b"\n# nothing\n", b"\xff\xfe", b"#" * 1024 * 1025], ids=["empty", "comment", "binary", "long"]
)
def test_a_file_that_cannot_be_used(content: bytes, tmp_path: Path) -> None:
    """A file without any key, or that is no text or too long, is refused: it must not open the server to everybody."""
    path = tmp_path / "keys"
    path.write_bytes(content)
    with pytest.raises(KeysError, match="keys: "):
        Keys("", path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    """A file that is missing is an error, and so are a folder and an environment variable without a key."""
    for text, path in (("", tmp_path / "no"), ("", tmp_path), ("# none", None)):
        with pytest.raises(KeysError):
            Keys(text, path)


@given(st.text(max_size=300))
def test_any_text_is_keys_or_a_keys_error(text: str) -> None:
    """No text, however odd, gives another exception."""
    with contextlib.suppress(KeysError):
        Keys(text)


# --- replacing keys while the server runs -------------------------------------------------------------------------------


def test_the_file_is_read_again_when_it_changed(file: Path) -> None:
    """A key that is added is known, and one that is removed is not, one second later at the latest."""
    clock = Clock()
    keys = Keys("", file, clock=clock)
    write(file, line("bob", BOB) + line("carol", CAROL))
    assert keys.tenant(ALICE)
    clock.now += 1
    assert [keys.tenant(key) and True for key in (ALICE, BOB, CAROL)] == [None, True, True]


def test_a_file_that_did_not_change_is_not_read_again(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many requests come, the file is looked at once a second, and opened only when it has changed."""
    clock, calls = Clock(), []

    def counted(name: str) -> Any:
        real = getattr(Path, name)

        def call(self: Path, *given: Any, **named: Any) -> Any:
            calls.append(name)
            return real(self, *given, **named)

        return call

    for name in ("open", "stat"):
        monkeypatch.setattr(Path, name, counted(name))
    keys = Keys("", file, clock=clock)
    for _ in range(50):
        clock.now += 0.1
        keys.tenant(ALICE)
    assert calls.count("open") == 1
    assert 5 <= calls.count("stat") <= 6  # at start, and in the five seconds since


@pytest.mark.parametrize(
    "broken", ["", "alice", BOTH[:-20], "\x00\xff", None], ids=["empty", "word", "cut off", "binary", "missing"]
)
def test_a_broken_file_keeps_the_old_keys(broken: str | None, file: Path, caplog: pytest.LogCaptureFixture) -> None:
    """While the file cannot be used the old keys stay; that is said once, without the content; a good file is taken again."""
    clock = Clock()
    keys = Keys("", file, clock=clock)
    if broken is None:
        file.unlink()
    else:
        write(file, broken)
    for _ in range(5):
        clock.now += 1
        assert keys.tenant(ALICE)
        assert keys.tenant(BOB)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert str(file) in caplog.text
    assert hashlib.sha256(ALICE).hexdigest()[:20] not in caplog.text
    write(file, line("carol", CAROL))
    clock.now += 1
    assert [keys.tenant(key) and True for key in (ALICE, CAROL)] == [None, True]


# --- the salt -----------------------------------------------------------------------------------------------------------


@given(st.binary(min_size=1, max_size=64), st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", fullmatch=True))
def test_the_salt_is_sound(secret: bytes, name: str) -> None:
    """A salt is 52 letters and digits, tells no name, is always the same, and another for another secret or tenant."""
    found = salt(secret, Tenant(name))
    assert re.fullmatch(r"[a-z2-7]{52}", found)
    assert found == salt(secret, Tenant(name, Limits(1, 2, 3)))
    assert len({found, salt(secret + b"x", Tenant(name)), salt(secret, Tenant(name + "x"))}) == 3


def test_who_is_everybody_has_no_salt() -> None:
    """Without keys all share the engine's cache."""
    assert salt(b"secret", ANONYMOUS) == ""


# --- through the server -------------------------------------------------------------------------------------------------


def keyed(**given: object) -> TestClient:
    """Return a client of a server that knows the keys of alice and bob."""
    return client(None, api_keys=BOTH, **given)


def using(key: bytes) -> dict[str, str]:
    """Return the header that brings a key."""
    return {"authorization": f"Bearer {key.decode()}"}


GUARDED = [
    ("POST", "/v1/vqa"),
    ("POST", "/v1/vqa/estimate"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/images"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/ergo"),
    ("DELETE", "/v1/images/img_x"),
    ("GET", "/v1/vqa"),
    ("OPTIONS", "/v1/vqa"),
    ("GET", "/v1/nowhere"),
    ("GET", "/nowhere"),
    ("GET", "//v1/models"),
    ("GET", "/V1/models"),
    ("GET", "/metrics"),
]


@pytest.mark.parametrize(("method", "path"), GUARDED)
def test_missing_and_wrong_key_get_the_same_answer(method: str, path: str) -> None:
    """Without a known key every path but the open ones is a 401, whose body does not tell a missing from a wrong key."""
    http = keyed()
    headers = [{}, using(b"ergo-wrong"), {"authorization": "Basic eDp5"}, {"x-api-key": ALICE.decode()}]
    responses = [http.request(method, path, headers=each) for each in headers]
    assert {error(response) for response in responses} == {(401, "invalid_api_key", None)}
    assert len({response.content for response in responses}) == 1
    assert {response.headers["www-authenticate"] for response in responses} == {"Bearer"}
    assert responses[0].json()["error"]["type"] == "authentication_error"


@pytest.mark.parametrize("path", ["/", "/static/page.js", "/healthz", "/health", "/readyz", "/version", "/docs", "/openapi.json"])
def test_what_stays_open(path: str) -> None:
    """Probes, the page with its files, the version and the interface's description need no key."""
    assert keyed().get(path).status_code == 200


def test_metrics_can_be_opened() -> None:
    """Metrics ask for a key unless the operator opens them."""
    assert keyed().get("/metrics", headers=using(BOB)).status_code == 200
    assert keyed(open_metrics=True).get("/metrics").status_code == 200


def test_a_key_lets_in() -> None:
    """With a known key the question is answered, and models are listed."""
    http = keyed()
    http.headers.update(using(ALICE))
    assert vqa(http).json()["answer"] == "seven"
    assert http.get("/v1/models").status_code == 200


def test_failures_are_counted() -> None:
    """Missing and wrong keys are counted apart, and questions that were refused are among the questions, under the route."""
    http = keyed(open_metrics=True)
    vqa(http)
    http.get("/v1/models", headers=using(b"ergo-wrong"))
    meter = Meter.of(http)
    assert [meter("ergo_auth_failures_total", reason=reason) for reason in ("missing", "invalid")] == [1, 1]
    assert meter("ergo_requests_total", policy="none", outcome="invalid_api_key") == meter("ergo_requests_total") == 1
    assert meter("ergo_http_requests_total", route="/v1/vqa", code="401") == 1
    assert meter("ergo_http_requests_total", route="/v1/models", code="401") == 1


def test_nothing_is_read_of_a_stranger() -> None:
    """Who brings no key is answered from the head: 401, whatever the body is, or 413 where it is too long for anybody."""
    engine = scripted()
    http = client(engine, api_keys=BOTH, max_body_bytes=1000)
    responses = [
        http.post("/v1/vqa", content=b"x" * 2000),
        http.post("/v1/vqa", content=b"{", headers={"content-type": "application/json"}),
        http.post("/v1/vqa", content=b"x", headers={"content-length": "999999999999"}),
    ]
    assert [response.status_code for response in responses] == [413, 401, 413]
    assert not engine.calls


def test_rotation_while_the_server_runs(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    """On a real server a new key works and the old one no longer does, without a restart, and neither is in the log."""
    with caplog.at_level(logging.DEBUG, "ergo_server"), support.gateway(scripted(), api_keys_file=file) as url:

        def status(key: bytes) -> int:
            return httpx2.get(f"{url}/v1/models", headers=using(key), trust_env=False).status_code

        assert (status(ALICE), status(CAROL)) == (200, 401)
        write(file, line("carol", CAROL))
        support.wait_until(lambda: status(CAROL) == 200, "the new key works")
        assert status(ALICE) == 401
    assert not [word for word in ("ergo-alice", "ergo-carol", hashlib.sha256(CAROL).hexdigest()) if word in caplog.text]


# --- the command --------------------------------------------------------------------------------------------------------


def _run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ergo_server", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | environment)


def test_a_new_key(tmp_path: Path) -> None:
    """``keys new`` writes a line that makes the key known that it shows; another time it is another key."""
    path = tmp_path / "keys"
    done = [_run("keys", "new", "alice") for _ in range(2)]
    path.write_text("".join(each.stdout for each in done))
    keys, shown = Keys("", path), [each.stderr.split()[0] for each in done]
    assert [keys.tenant(key.encode()) for key in shown] == [Tenant("alice")] * 2
    assert len(set(shown)) == 2
    assert not [key for key in shown if key in path.read_text()]


@pytest.mark.parametrize("name", ["", "a b", "anonymous", "-x", "a/b", "ä"])
def test_a_name_that_is_none(name: str) -> None:
    """A name that no line could hold is refused by the command."""
    done = _run("keys", "new", "--", name)
    assert (done.returncode, done.stdout) == (2, "")


def test_a_server_with_broken_keys_does_not_start(tmp_path: Path) -> None:
    """``serve`` says in one line which line of which file is wrong, and ends with status 1."""
    path = tmp_path / "keys"
    path.write_text(f"alice {SECRET}\n")
    done = _run("serve", "--port", "0", ERGO_API_KEYS_FILE=str(path))
    assert done.returncode == 1
    assert f"{path}, line 1: " in done.stderr
    assert done.stderr.count("\n") == 1
    assert SECRET not in done.stderr
