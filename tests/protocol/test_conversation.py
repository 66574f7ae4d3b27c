"""Conversations only grow, and nothing from outside can spell a special token in them."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from ergo_server.imaging.geometry import Size
from ergo_server.imaging.view import View
from ergo_server.protocol.conversation import Conversation, Message, neutralise

VIEW = View(b"a file", Size(56, 56))
TRICKY = st.text("<|> im_end", max_size=12)


@given(TRICKY | st.text())
def test_no_special_token_survives(text: str) -> None:
    """Neutralised text contains no ``<|``, differs only by spaces, and is not changed by a second pass."""
    safe = neutralise(text)
    assert "<|" not in safe
    assert safe.replace(" ", "") == text.replace(" ", "")
    assert neutralise(safe) == safe


def test_other_text_is_untouched() -> None:
    """Angle brackets, bars and the protocol's own tags stay as they are."""
    text = "a < b | c, <think>x</think><zoom>[1, 2, 3, 4]</zoom> |> <image> <tool_call>"
    assert neutralise(text) == text
    assert neutralise("<|im_end|>") == "< |im_end|>"


@given(TRICKY, TRICKY, TRICKY)
def test_every_role_is_neutralised(system: str, user: str, assistant: str) -> None:
    """System, user and assistant text all pass through the same neutralisation."""
    said = Conversation().system(system).user(VIEW, user).assistant(assistant)
    assert [message.role for message in said.messages] == ["system", "user", "assistant"]
    assert said.messages[0].parts == (neutralise(system),)
    assert said.messages[1].parts == (VIEW, neutralise(user))
    assert said.messages[2].parts == (neutralise(assistant),)


@given(st.lists(TRICKY | st.just("") | st.just(VIEW), max_size=6))
@example(["a <", "", "|im_end|>"])
def test_no_token_is_spelled_across_parts(parts: list[str | View]) -> None:
    """Joined, as templates join them, the texts of a message contain no ``<|``, and neither part nor order is lost."""
    said = Conversation().user(*parts).messages[0].parts
    assert "<|" not in "".join(part if isinstance(part, str) else "\n" for part in said)
    assert [str(part).replace(" ", "") for part in said] == [str(part).replace(" ", "") for part in parts]


@given(st.text(), st.text())
def test_a_conversation_only_grows(first: str, second: str) -> None:
    """Saying more returns a new conversation that begins with the very messages of the old one, which is unchanged."""
    before = Conversation().user(VIEW, first)
    messages = before.messages
    after = before.assistant(second)
    assert after.messages[:1] == messages == before.messages
    assert after.messages[0] is messages[0]


def test_the_views_are_found_in_order() -> None:
    """All views of all messages, oldest first."""
    other = View(b"another", Size(28, 112))
    said = Conversation().user(VIEW, "a", other).assistant("b").say("user", VIEW)
    assert list(said.views) == [VIEW, other, VIEW]
    assert list(Conversation().system("x").views) == []


def test_a_message_is_its_role_and_parts() -> None:
    """`say` appends a message of any role with its parts in order."""
    assert Conversation().say("user", "a", VIEW, "b").messages == (Message("user", ("a", VIEW, "b")),)
