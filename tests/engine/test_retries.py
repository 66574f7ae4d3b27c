"""The retry budget by itself; tests/engine/test_vllm.py shows what it does to an engine that fails."""

from __future__ import annotations

from itertools import product

from hypothesis import given, settings
from hypothesis import strategies as st

from ergo_server.engine.retries import RetryBudget, RetryOutcome


@given(
    share=st.floats(0, 1),
    burst=st.integers(0, 20),
    events=st.lists(st.booleans(), max_size=200),
)
@settings(deadline=None)
def test_retries_never_exceed_what_was_earned(share: float, burst: int, events: list[bool]) -> None:
    """Whatever the order of requests and failures, at most the burst and the requests' share is retried, and all is told."""
    told: list[RetryOutcome] = []
    budget = RetryBudget(share, burst, told.append)
    taken = []
    for request in events:
        if request:
            budget.earn()
        else:
            taken.append(budget.take())
    assert sum(taken) <= burst + share * sum(events)
    assert told == ["retried" if granted else "budget_exhausted" for granted in taken]


def test_a_full_budget_grants_its_burst_and_then_a_share() -> None:
    """Ten failures at the start are met with a retry each, whatever came before; then it takes ten requests to earn one more."""
    for before, share in product((0, 1000), (0.125, 0.5)):
        budget = RetryBudget(share, 10)
        for _ in range(before):
            budget.earn()
        assert [budget.take() for _ in range(12)] == [True] * 10 + [False] * 2
        for _ in range(int(1 / share) - 1):
            budget.earn()
            assert not budget.take()
        budget.earn()
        assert budget.take()
