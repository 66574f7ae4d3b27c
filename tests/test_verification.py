"""Finished questions asked again with the crop alone: which, when, and that no caller notices."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from functools import partial
from typing import Any

import httpx2
import pytest
import support
from asking import ANSWER, ZOOM, Meter, data_url, picture, texts
from pydantic import ValidationError

from ergo_server.api.admission import Gate
from ergo_server.engine.base import Delta, Generation, Sampling
from ergo_server.engine.scripted import ScriptedEngine
from ergo_server.errors import EngineError, EngineFailed
from ergo_server.protocol.conversation import Conversation

QUESTION = "How many?"
REWARD = "ergo_reward_region_total"


def engine(again: str | EngineError = ANSWER, seconds_per_token: float = 0.0) -> ScriptedEngine:
    """Return an engine that says ``again`` when it is asked with one image alone."""

    def script(conversation: Conversation, sampling: Sampling) -> str | EngineError:
        if "</zoom>" in sampling.stop:
            return ZOOM
        return ANSWER if len(list(conversation.views)) > 1 else again

    return ScriptedEngine(script, seconds_per_token)


class Patient(ScriptedEngine):
    """An engine that never comes to an end when it is asked with one image alone."""

    waiting = 0

    async def _replay(
        self, conversation: Conversation, sampling: Sampling, session: str
    ) -> AsyncGenerator[Delta | Generation, None]:
        if "</zoom>" not in sampling.stop and len(list(conversation.views)) == 1:
            self.waiting += 1
            try:
                await asyncio.Event().wait()
            finally:
                self.waiting -= 1
        async for piece in super()._replay(conversation, sampling, session):
            yield piece


def ask(url: str, **more: Any) -> httpx2.Response:
    """Ask a question."""
    body = {"image": data_url(picture()), "question": QUESTION} | more
    return httpx2.post(f"{url}/v1/vqa", json=body, trust_env=False, timeout=support.START_SECONDS)


def settled(meter: Meter, wanted: int, *outcomes: str) -> None:
    """Wait until so many verifications came to one of these ends."""
    support.wait_until(lambda: sum(meter(REWARD, outcome=outcome) for outcome in outcomes) == wanted, f"{wanted} {outcomes}")


@pytest.mark.parametrize(
    ("again", "outcome"),
    [
        (ANSWER, "agrees"),
        ("<answer>Seven.</answer>", "agrees"),
        ("<answer>nine</answer>", "differs"),
        ("", "differs"),
        (EngineFailed("broke"), "failed"),
    ],
)
def test_what_the_crop_alone_says_is_compared(again: str | EngineError, outcome: str) -> None:
    """The question is put once more with the crop and nothing else; whether the answer is the served one is counted."""
    asked = engine(again)
    with support.gateway(asked, engine="vllm", verify_fraction=1) as url:
        response = ask(url, include=["crop"])
        assert (response.status_code, response.json()["answer"]) == (200, "seven")
        settled(Meter.of(url), 1, outcome)
        assert Meter.of(url)(REWARD) == 1
    *_, (conversation, sampling, session) = asked.calls
    (view,) = conversation.views
    assert view.data_url == response.json()["regions"][0]["crop"]["data"]
    assert QUESTION in texts(conversation)
    assert "zoom" not in texts(conversation)
    assert (sampling.temperature, session) == (0, "")


@pytest.mark.parametrize(("served", "again", "outcome"), [("B", "blue", "agrees"), ("blue", "(A)", "differs")])
def test_choices_are_compared_by_what_they_mean(served: str, again: str, outcome: str) -> None:
    """A letter and the choice's text are the same answer."""
    asked = engine()

    def script(conversation: Conversation, sampling: Sampling) -> str:
        said = served if len(list(conversation.views)) > 1 else again
        return ZOOM if "</zoom>" in sampling.stop else f"<think>x</think><answer>{said}</answer>"

    asked.script = script
    with support.gateway(asked, engine="vllm", verify_fraction=1) as url:
        ask(url, choices=["red", "blue"])
        settled(Meter.of(url), 1, outcome)


def test_it_is_off_unless_wanted() -> None:
    """By default nothing is asked twice; the rewards that cost nothing are counted all the same."""
    asked = engine()
    with support.gateway(asked) as url:
        assert ask(url).status_code == 200
        meter = Meter.of(url)
        assert meter(REWARD) == 0
        assert (meter("ergo_reward_box_total", value="1"), meter("ergo_reward_box_total", value="0")) == (1, 0)
        assert (meter("ergo_reward_format_total", value="1"), meter("ergo_reward_format_total", value="0")) == (1, 0)
    assert len(asked.calls) == 2


def test_only_what_was_zoomed_is_verified() -> None:
    """Without a crop there is nothing to verify, and nothing is dropped either."""
    asked = engine()
    with support.gateway(asked, engine="vllm", verify_fraction=1) as url:
        assert ask(url, zoom="never").status_code == 200
        assert ask(url).status_code == 200
        settled(Meter.of(url), 1, "agrees")
        assert Meter.of(url)(REWARD) == 1
    assert len(asked.calls) == 1 + 2 + 1


def test_callers_do_not_wait_and_the_rest_is_dropped() -> None:
    """While as many as may are verified, callers are answered as before, and what comes on top is dropped and counted."""
    asked = Patient(engine().script)
    with support.gateway(asked, engine="vllm", verify_fraction=1, verify_concurrent=1) as url:
        assert ask(url).status_code == 200
        support.wait_until(lambda: asked.waiting == 1, "the first is verified")
        assert [ask(url).status_code for _ in range(5)] == [200] * 5
        settled(Meter.of(url), 5, "dropped")
        assert Meter.of(url)(REWARD) == 5
    assert asked.waiting == 0


def test_the_server_that_is_half_full_verifies_nothing() -> None:
    """Verification takes places only while more than half are free, and none while the server stops."""

    async def work() -> None:
        gate = Gate(max_concurrent=4, max_queued=4, queue_seconds=60, max_bytes=1)
        seen = [gate.crowded]
        for _ in range(4):
            await gate.enter(partial(asyncio.sleep, support.START_SECONDS))
            seen.append(gate.crowded)
        assert seen == [False, False, False, True, True]
        for _ in range(4):
            gate.leave()
        assert not gate.crowded
        gate.drain()
        assert gate.crowded

    asyncio.run(work())


@pytest.mark.vllm
def test_another_engine_may_be_asked(vllm: str) -> None:
    """With verify_engine the question goes to that vLLM, and the embedded engine is left to the callers."""
    before = support.metric(vllm, "vllm:request_success_total")
    scene = support.held_out(11)
    with support.gateway(verify_fraction=1, verify_engine=vllm) as url:
        body = {"image": data_url(support.encode(scene), "jpeg"), "question": scene.question}
        response = httpx2.post(f"{url}/v1/vqa", json=body, trust_env=False, timeout=support.START_SECONDS)
        assert response.json()["answer"] == scene.answer
        settled(Meter.of(url), 1, "agrees", "differs")
    assert support.metric(vllm, "vllm:request_success_total") == before + 1


def test_settings_that_would_keep_callers_waiting_are_refused() -> None:
    """Verification by the one embedded model, and an address that is none, are refused at the start."""
    with pytest.raises(ValidationError, match="needs a verify_engine"):
        support.mini_settings(verify_fraction=0.1)
    with pytest.raises(ValidationError, match="verify_engine must be"):
        support.mini_settings(verify_fraction=0.1, verify_engine="engine:8001")
