"""What each tenant may use: buckets, their headers, and refusals, by a clock that is set by hand where time matters."""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Iterator
from typing import Any

import openai
import pytest
import support
from asking import Meter, chat, client, data_url, error, picture, says, scripted, vqa
from hypothesis import given
from hypothesis import strategies as st
from starlette.responses import PlainTextResponse
from starlette.testclient import TestClient

from ergo_server.api.admission import Admission, Gate
from ergo_server.api.keys import Keys, Limits, Tenant
from ergo_server.api.limits import Bucket, Refused, TenantLimits
from ergo_server.telemetry.metrics import Metrics


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def line(name: str, limits: str = "") -> str:
    """Return the line of a tenant whose key is its name."""
    return f"{name} {hashlib.sha256(name.encode()).hexdigest()} {limits};"


def using(name: str) -> dict[str, str]:
    """Return the header that brings the key of a tenant."""
    return {"authorization": f"Bearer {name}"}


def refusal(limits: TenantLimits, tenant: Tenant) -> Refused:
    """Return why a request of a tenant is refused; fails if it is not."""
    with pytest.raises(Refused) as caught, limits.entered(tenant):
        pass
    return caught.value


def use(limits: TenantLimits, tenant: Tenant, visual_tokens: int = 0) -> None:
    """Let one request run to its end."""
    with limits.entered(tenant):
        limits.charge(tenant.name, visual_tokens)


def shown(limits: TenantLimits, tenant: Tenant) -> dict[str, str]:
    """Return the headers, without what all their names begin with."""
    return {name.decode().removeprefix("x-ratelimit-"): value.decode() for name, value in limits.headers(tenant)}


# --- the bucket ---------------------------------------------------------------------------------------------------------

STEPS = st.lists(st.tuples(st.floats(0, 100), st.integers(0, 500)), max_size=50)


@given(st.integers(1, 1000), STEPS)
def test_a_bucket_conserves(per_minute: int, steps: list[tuple[float, int]]) -> None:
    """Whatever is taken and whenever: the level is what was there plus inflow less outflow, never above a minute's worth."""
    clock = Clock()
    bucket = Bucket(per_minute, clock)
    expected = float(per_minute)
    for seconds, amount in steps:
        clock.now += seconds
        expected = min(per_minute, expected + seconds * per_minute / 60)
        assert bucket.level == pytest.approx(expected)
        bucket.take(amount)
        expected -= amount
        assert bucket.level == pytest.approx(expected)
        assert bucket.level <= per_minute


@given(st.integers(1, 1000), STEPS)
def test_no_window_passes_more_than_burst_and_flow(per_minute: int, steps: list[tuple[float, int]]) -> None:
    """Who takes one at a time, only when there is one, gets at most a minute's worth plus what flowed in."""
    clock, taken = Clock(), 0
    bucket = Bucket(per_minute, clock)
    for seconds, tries in steps:
        clock.now += seconds
        for _ in range(tries):
            if not bucket.seconds_until(1):
                bucket.take(1)
                taken += 1
        assert bucket.level >= 0
    assert taken <= per_minute * (1 + clock.now / 60) * (1 + 1e-9)


@given(st.integers(1, 1000), st.integers(0, 3000))
def test_the_wait_is_exact(per_minute: int, taken: int) -> None:
    """After the seconds that the bucket names there is one, and not before."""
    clock = Clock()
    bucket = Bucket(per_minute, clock)
    bucket.take(taken)
    wait = bucket.seconds_until(1)
    if wait:
        clock.now += 0.99 * wait
        assert bucket.level < 1
        clock.now += 0.0101 * wait
    assert bucket.level >= 1


def test_putting_back_never_overfills() -> None:
    """A bucket that was filled up meanwhile stays at its brim."""
    clock = Clock()
    bucket = Bucket(60, clock)
    bucket.take(1)
    clock.now += 60
    bucket.take(-1)
    assert bucket.level == 60


# --- a tenant's limits --------------------------------------------------------------------------------------------------


def test_requests_a_minute() -> None:
    """A minute's worth may be asked at once; then one is refused, told when to come back, and let in then."""
    clock, tenant = Clock(), Tenant("a", Limits(requests_per_minute=6))
    limits = TenantLimits(clock)
    for _ in range(6):
        use(limits, tenant)
    why = refusal(limits, tenant)
    assert (why.reason, why.error.status, why.error.retry_after, why.retry_ms) == ("rate_limit", 429, 10, 10_000)
    assert "6 requests a minute" in why.error.message
    clock.now += 9.99
    assert refusal(limits, tenant).retry_ms == pytest.approx(10, abs=1)
    clock.now += 0.02
    use(limits, tenant)
    refusal(limits, tenant)


def test_requests_at_once() -> None:
    """No more than the limit run at once; whoever ends, well or not, makes room."""
    tenant = Tenant("a", Limits(concurrent_requests=2))
    limits = TenantLimits(Clock())
    with limits.entered(tenant):
        with contextlib.suppress(ValueError), limits.entered(tenant):
            why = refusal(limits, tenant)
            raise ValueError
        with limits.entered(tenant):
            refusal(limits, tenant)
        use(limits, tenant)
    assert (why.reason, why.error.retry_after) == ("concurrency", 1)
    assert "2 requests at once" in why.error.message


def test_visual_tokens_a_minute() -> None:
    """A request begins while there are any tokens; its true figure is taken; what it overdrew must flow in before the next."""
    clock, tenant = Clock(), Tenant("a", Limits(visual_tokens_per_minute=600))
    limits = TenantLimits(clock)
    use(limits, tenant, 599)
    use(limits, tenant, 1000)  # one was left
    why = refusal(limits, tenant)
    assert (why.reason, why.error.retry_after) == ("token_budget", 100)
    assert "600 visual tokens a minute" in why.error.message
    assert shown(limits, tenant) == {"limit-tokens": "600", "remaining-tokens": "0", "reset-tokens": "2m39.9s"}
    clock.now += 100.001
    use(limits, tenant)


def test_the_wait_that_is_told_is_bounded() -> None:
    """However much is owed, nobody is told to wait for more than the 120 s after which openai-python would give up."""
    tenant = Tenant("a", Limits(visual_tokens_per_minute=1))
    limits = TenantLimits(Clock())
    use(limits, tenant, 1_000_000)
    why = refusal(limits, tenant)
    assert (why.error.retry_after, why.retry_ms) == (120, 120_000)


def test_tenants_do_not_share() -> None:
    """What one tenant uses is nothing to another."""
    limits = TenantLimits(Clock())
    first, second = (Tenant(name, Limits(1, 1, 10)) for name in "ab")
    with limits.entered(first):
        limits.charge("a", 500)
        use(limits, second, 3)
    assert refusal(limits, first).reason == "rate_limit"
    assert shown(limits, second)["remaining-tokens"] == "7"
    assert shown(limits, first)["remaining-tokens"] == "0"


def test_what_the_server_refuses_costs_nothing() -> None:
    """A request that the server as a whole could not take is given back to its tenant."""
    tenant = Tenant("a", Limits(requests_per_minute=5))
    limits = TenantLimits(Clock())
    with contextlib.suppress(Refused), limits.entered(tenant):
        assert shown(limits, tenant)["remaining-requests"] == "4"
        raise refusal_of_the_server()
    assert shown(limits, tenant)["remaining-requests"] == "5"


def refusal_of_the_server() -> Refused:
    """Return a refusal by a gate without places."""
    with pytest.raises(Refused) as caught:
        Gate(max_concurrent=1, max_queued=0, queue_seconds=1, max_bytes=0).reserve(1)
    return caught.value


def test_no_limit_is_no_limit() -> None:
    """A limit of 0 bounds nothing, and shows no header."""
    tenant = Tenant("a")
    limits = TenantLimits(Clock())
    with contextlib.ExitStack() as running:
        for _ in range(1000):
            running.enter_context(limits.entered(tenant))
            limits.charge("a", 10**9)
    assert shown(limits, tenant) == {}


def test_headers_fall_and_rise() -> None:
    """Remaining falls with use and rises with time, a whole number; reset is the time until all is there, as OpenAI writes it."""
    clock, tenant = Clock(), Tenant("a", Limits(60, 0, 6000))
    limits = TenantLimits(clock)
    names = ("remaining-requests", "reset-requests", "remaining-tokens", "reset-tokens")

    def now() -> tuple[str, ...]:
        return tuple(shown(limits, tenant)[name] for name in names)

    assert now() == ("60", "0s", "6000", "0s")
    use(limits, tenant, 1234)
    use(limits, tenant, 1)
    assert now() == ("58", "2s", "4765", "12.35s")
    clock.now += 1.25
    assert now() == ("59", "750ms", "4890", "11.1s")
    clock.now += 60
    assert now() == ("60", "0s", "6000", "0s")
    for _ in range(60):
        use(limits, tenant, 100)
    assert now() == ("0", "1m0s", "0", "1m0s")
    assert (shown(limits, tenant)["limit-requests"], shown(limits, tenant)["limit-tokens"]) == ("60", "6000")


def test_changed_limits_hold_at_once() -> None:
    """A tenant whose limits were changed begins anew with them; what runs still counts."""
    limits = TenantLimits(Clock())
    before, after = Tenant("a", Limits(requests_per_minute=1)), Tenant("a", Limits(3, 2, 0))
    with limits.entered(before):
        refusal(limits, before)
        with limits.entered(after):
            assert refusal(limits, after).reason == "concurrency"
            assert shown(limits, before)["limit-requests"] == "3"
    with limits.entered(after):
        pass


def test_memory_is_bounded() -> None:
    """Tenants that no longer ask are forgotten when another comes; those that run or owe are not."""
    clock = Clock()
    limits = TenantLimits(clock)
    owing, running = Tenant("owing", Limits(0, 0, 60)), Tenant("running", Limits(0, 1, 0))
    use(limits, owing, 6000)
    with limits.entered(running):
        for number in range(1000):
            clock.now += 1
            use(limits, Tenant(f"t{number}", Limits(60, 1, 60)), 1)
            assert len(limits._accounts) <= 4
        refusal(limits, owing)
        refusal(limits, running)


# --- through HTTP -------------------------------------------------------------------------------------------------------


@pytest.fixture
def clock() -> Clock:
    """The clock of `http`."""
    return Clock()


@pytest.fixture
def http(clock: Clock) -> TestClient:
    """A client of the middleware by a clock that is set by hand: alice may ask 3 times a minute, bob has 1,000 visual tokens."""
    keys = Keys(line("alice", "requests_per_minute=3") + line("bob", "visual_tokens_per_minute=1000"))
    limits = TenantLimits(clock)
    gate = Gate(max_concurrent=9, max_queued=0, queue_seconds=1, max_bytes=10**6)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if "spend" in scope["query_string"].decode():
            limits.charge(scope["tenant"].name, 2000)
        await PlainTextResponse(scope["tenant"].name)(scope, receive, send)

    return TestClient(Admission(app, keys, limits, gate, Metrics(()), open_metrics=True))


def test_429_says_when_to_come_back(http: TestClient, clock: Clock) -> None:
    """The refusal has the envelope, whole seconds and exact milliseconds, and the headers; who waits so long is let in."""
    seen = [http.post("/v1/vqa", headers=using("alice")) for _ in range(4)]
    assert [response.status_code for response in seen] == [200, 200, 200, 429]
    assert [response.headers["x-ratelimit-remaining-requests"] for response in seen] == ["2", "1", "0", "0"]
    assert {response.headers["x-ratelimit-limit-requests"] for response in seen} == {"3"}
    assert [response.headers["x-ratelimit-reset-requests"] for response in seen] == ["20s", "40s", "1m0s", "1m0s"]
    assert (seen[-1].headers["retry-after"], seen[-1].headers["retry-after-ms"]) == ("20", "20000")
    assert seen[-1].json()["error"]["code"] == "rate_limit_exceeded"
    assert seen[-1].json()["error"]["type"] == "rate_limit_error"
    clock.now += 19.5
    late = http.post("/v1/vqa", headers=using("alice"))
    assert (late.status_code, late.headers["retry-after"], late.headers["retry-after-ms"]) == (429, "1", "500")
    clock.now += 0.5
    assert http.post("/v1/vqa", headers=using("alice")).status_code == 200


def test_what_a_request_cost_shows_in_its_own_headers(http: TestClient, clock: Clock) -> None:
    """Tokens that are charged before the response begins are in its headers; the next request waits until they flowed in."""
    first = http.post("/v1/chat/completions?spend", headers=using("bob"))
    assert (first.status_code, first.headers["x-ratelimit-remaining-tokens"]) == (200, "0")
    assert first.headers["x-ratelimit-reset-tokens"] == "2m0s"
    second = http.post("/v1/chat/completions", headers=using("bob"))
    assert (second.status_code, second.headers["retry-after"]) == (429, "61")
    clock.now += 61
    assert http.post("/v1/chat/completions", headers=using("bob")).headers["x-ratelimit-remaining-tokens"] == "16"


def test_only_what_makes_work_is_limited(http: TestClient) -> None:
    """Other paths and methods cost nothing, and show no headers of the limits."""
    for _ in range(10):
        response = http.get("/v1/models", headers=using("alice"))
        assert (response.status_code, response.text) == (200, "alice")
        assert not [name for name in response.headers if name.startswith("x-ratelimit")]


def test_two_tenants_through_the_server() -> None:
    """On the whole app: one tenant's limit stops that tenant on every path, and not the other; it is counted."""
    http = client(api_keys=line("alice") + line("bob"), requests_per_minute=2, open_metrics=True)
    http.headers.update(using("alice"))
    assert [vqa(http).status_code, chat(http).status_code, vqa(http).status_code] == [200, 200, 429]
    assert error(chat(http)) == (429, "rate_limit_exceeded", None)
    http.headers.update(using("bob"))
    response = chat(http)
    assert (response.status_code, response.headers["x-ratelimit-remaining-requests"]) == (200, "1")
    meter = Meter.of(http)
    assert meter("ergo_admission_rejections_total", reason="rate_limit") == meter("ergo_admission_rejections_total") == 2
    assert meter("ergo_requests_total", policy="none", outcome="rate_limit_exceeded") == 2
    assert meter("ergo_http_requests_total", code="429") == 2


def test_a_tenant_at_its_concurrency() -> None:
    """On a real server a second request of one tenant is refused while the first runs, and another tenant's is not."""
    engine = scripted(seconds_per_token=0.05, zoom="<zoom>[1, 2, 30, 40]</zoom>", answer="<answer>" + "why " * 2000)
    keys = line("alice", "concurrent_requests=1") + line("bob")
    with support.gateway(engine, api_keys=keys, open_metrics=True) as url, contextlib.ExitStack() as running:
        for name in ("alice", "bob"):
            running.enter_context(streamed(url, name))
        with pytest.raises(openai.RateLimitError) as caught, streamed(url, "alice"):
            pass
        assert "1 requests at once" in str(caught.value)
        assert Meter.of(url)("ergo_admission_rejections_total", reason="concurrency") == 1


@contextlib.contextmanager
def sdk(url: str, key: str) -> Iterator[openai.OpenAI]:
    """The openai SDK with a key."""
    http = openai.DefaultHttpxClient(trust_env=False)
    with openai.OpenAI(base_url=f"{url}/v1", api_key=key, http_client=http, max_retries=0) as client:
        yield client


MESSAGES: Any = [
    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": data_url(picture())}}, {"type": "text", "text": "?"}]}
]


@contextlib.contextmanager
def streamed(url: str, key: str) -> Iterator[None]:
    """Ask through the SDK, and hold the stream open after its first piece."""
    with sdk(url, key) as client, client.chat.completions.create(model="ergo", messages=MESSAGES, stream=True) as stream:
        next(iter(stream))
        yield


def test_the_sdks_own_errors() -> None:
    """The openai SDK raises its AuthenticationError and RateLimitError, with code, text and what to wait for."""
    with support.gateway(scripted(), api_keys=line("alice", "requests_per_minute=1")) as url:
        with sdk(url, "wrong") as client, pytest.raises(openai.AuthenticationError) as unknown:
            client.models.list()
        with sdk(url, "alice") as client:
            assert client.chat.completions.create(model="ergo", messages=MESSAGES).choices[0].message.content == "seven"
            with pytest.raises(openai.RateLimitError) as limited:
                client.chat.completions.create(model="ergo", messages=MESSAGES)
    assert (unknown.value.code, unknown.value.type) == ("invalid_api_key", "authentication_error")
    assert (limited.value.code, limited.value.type) == ("rate_limit_exceeded", "rate_limit_error")
    assert 0 < int(limited.value.response.headers["retry-after"]) <= 60


def test_the_sdk_waits_and_succeeds() -> None:
    """The SDK with its own retries comes back as it is told, and gets its answer once there is room: its user notices nothing."""
    engine = scripted(seconds_per_token=0.05, zoom="<zoom>[1, 2, 30, 40]</zoom>", answer="<answer>" + "why " * 2000)
    found: list[str | None] = []

    def ask() -> None:
        with sdk(url, "alice") as client:
            patient = client.with_options(max_retries=50)
            found.append(patient.chat.completions.create(model="ergo", messages=MESSAGES).choices[0].message.content)

    with support.gateway(engine, api_keys=line("alice", "concurrent_requests=1"), open_metrics=True) as url:
        meter, asking = Meter.of(url), threading.Thread(target=ask)
        with streamed(url, "alice"):
            asking.start()
            support.wait_until(lambda: meter("ergo_admission_rejections_total", reason="concurrency") > 0, "it was refused")
            engine.script = scripted().script
        asking.join()
    assert found == ["seven"]


@pytest.mark.parametrize("stream", [False, True])
def test_what_goes_past_the_pipeline_is_charged_too(stream: bool) -> None:
    """A question to ``ergo-raw`` costs its tenant the visual tokens that the engine counted: of 60 a minute, 100 leave none."""
    with client(api_keys=line("alice", "visual_tokens_per_minute=60")) as http:
        http.headers.update(using("alice"))
        assert chat(http, says(picture(280, 280), "?"), model="ergo-raw", stream=stream).status_code == 200
        assert error(vqa(http))[:2] == (429, "rate_limit_exceeded")
