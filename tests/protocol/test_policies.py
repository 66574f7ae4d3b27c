"""The two policies, and the one place where a model's box becomes a region of the original."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ergo_server.imaging.geometry import Box, PixelBudget, Size
from ergo_server.imaging.view import View
from ergo_server.protocol.base import (
    Answer,
    CropRule,
    Malformed,
    MalformedReason,
    Policy,
    Question,
    Region,
    Seen,
    Space,
    Zoom,
    cut,
)
from ergo_server.protocol.ergo import ErgoPolicy
from ergo_server.protocol.prompts import builtin_profile
from ergo_server.protocol.replies import parse_zoom
from ergo_server.protocol.single import SinglePolicy

Edges = tuple[float, float, float, float]
IMAGE, OVERVIEW = Size(4000, 2000), View(b"overview", Size(1000, 500))
WHOLE = (Seen(OVERVIEW, Box.whole(IMAGE)),)
QUESTION = Question("What colour is it?", ("crimson", "azure"), "Reply with one letter.")
ERGO, SINGLE = ErgoPolicy(builtin_profile().prompts), SinglePolicy(builtin_profile().prompts)
EDGES = st.floats() | st.integers(-50, 1100).map(float) | st.floats(-5, 5) | st.sampled_from([1e308, -1e308, 5e-324, -0.0, 1e18])


def texts(policy: Policy, question: Question, reply: str | None = None) -> list[str]:
    """Return the texts of the user messages of the first turn, or of both."""
    ask = policy.first(question, OVERVIEW)
    if reply is not None:
        ask = policy.next(ask, reply, question, View(b"crop", Size(56, 56)))
    users = [message for message in ask.conversation.messages if message.role == "user"]
    return [part for message in users for part in message.parts if isinstance(part, str)]


def region(edges: Edges, space: Space = Space.SEEN, *, pad: float = 0.0, min_side: int = 1) -> Region | Malformed:
    """Cut a box from the overview."""
    return cut(Zoom(edges, space), WHOLE, IMAGE, CropRule(pad, min_side))


# --- ergo ---------------------------------------------------------------------------------------------------------------------


def test_the_first_turn_shows_the_overview_and_the_question() -> None:
    """System, then one user message of the overview and the question; it ends at the closing tag and is no answer."""
    ask = ERGO.first(QUESTION, OVERVIEW)
    system, user = ask.conversation.messages
    assert (system.role, user.role, user.parts[0]) == ("system", "user", OVERVIEW)
    assert user.parts[0] is OVERVIEW
    assert QUESTION.text in texts(ERGO, QUESTION)[0]
    assert (ask.stop, ask.answers) == (("</zoom>",), False)


@pytest.mark.parametrize("word", [*QUESTION.choices, QUESTION.instructions, "(A)"])
def test_the_choices_are_first_shown_in_the_answer_turn(word: str) -> None:
    """Neither choices nor instructions are in the zoom turn; both are in the answer turn."""
    assert word not in texts(ERGO, QUESTION)[0]
    zoom, answer = texts(ERGO, QUESTION, "<zoom>[1, 2, 3, 4]</zoom>")
    assert word not in zoom
    assert word in answer


@given(st.text(), st.text())
def test_the_second_turn_extends_the_first(question: str, reply: str) -> None:
    """The second turn begins with the very messages and view objects of the first, then the reply, then crop and question."""
    first = ERGO.first(Question(question), OVERVIEW)
    crop = View(b"crop", Size(56, 56))
    second = ERGO.next(first, reply, Question(question), crop)
    assert second.conversation.messages[:2] == first.conversation.messages
    assert all(a is b for a, b in zip(first.conversation.messages, second.conversation.messages, strict=False))
    assert [message.role for message in second.conversation.messages] == ["system", "user", "assistant", "user"]
    assert [view for view in second.conversation.views if view is crop or view is OVERVIEW] == [OVERVIEW, crop]
    assert (second.stop, second.answers) == (("</answer>",), True)


def test_the_reply_is_repeated_verbatim() -> None:
    """The assistant's message is the zoom reply, closing tag included."""
    reply = "<think> left\n</think> <zoom>[1, 2, 3, 4]</zoom>"
    second = ERGO.next(ERGO.first(QUESTION, OVERVIEW), reply, QUESTION, OVERVIEW)
    assert second.conversation.messages[2].parts == (reply,)


def test_the_first_reply_is_a_box_and_the_second_an_answer() -> None:
    """The same text means a place in turn 0 and an answer in turn 1."""
    reply = "<answer>B</answer><zoom>[1, 2, 3, 4]</zoom>"
    assert ERGO.parse(reply, 0) == Zoom((1, 2, 3, 4), Space.SEEN)
    assert ERGO.parse(reply, 1) == Answer("B")
    assert ERGO.parse("B", 0) == Malformed(MalformedReason.MISSING)
    assert ERGO.parse("<zoom>[1, 2, 3, 4]</zoom>", 1) == Answer("<zoom>[1, 2, 3, 4]</zoom>", tagged=False)


@pytest.mark.parametrize("reason", MalformedReason)
def test_without_a_box_the_whole_image_is_shown_again(reason: MalformedReason) -> None:
    """Whatever was wrong, the fallback is the whole image."""
    assert ERGO.on_malformed(Malformed(reason), IMAGE) == Box.whole(IMAGE)


@pytest.mark.parametrize("policy", [ERGO, SINGLE])
def test_no_special_token_reaches_a_conversation(policy: Policy) -> None:
    """``<|im_end|>`` in the question, a choice, the instructions or the reply is broken everywhere."""
    token = "<|im_end|>"
    ask = policy.first(Question(token, (token, token), token), OVERVIEW)
    if policy.max_turns > 1:
        ask = policy.next(ask, token, Question(token, (token, token), token), OVERVIEW)
    said = [part for message in ask.conversation.messages for part in message.parts if isinstance(part, str)]
    assert "< |im_end|>" in "".join(said)
    assert "<|" not in "".join(said)


def test_a_question_that_spells_a_field_is_not_expanded() -> None:
    """``{choices}`` in a question stays those nine characters, so it cannot draw the choices into the zoom turn."""
    question = Question("What do {choices} and {question} mean?", ("crimson", "azure"))
    for text in texts(ERGO, question, "x"):
        assert "What do {choices} and {question} mean?" in text


# --- single -------------------------------------------------------------------------------------------------------------------


def test_the_single_turn_shows_everything_at_once() -> None:
    """The only turn has the overview, question, choices and instructions, and its reply is the answer."""
    ask = SINGLE.first(QUESTION, OVERVIEW)
    assert list(ask.conversation.views) == [OVERVIEW]
    assert all(word in texts(SINGLE, QUESTION)[0] for word in (QUESTION.text, *QUESTION.choices, QUESTION.instructions))
    assert (ask.stop, ask.answers, SINGLE.max_turns) == (("</answer>",), True, 1)
    assert SINGLE.parse("<zoom>[1, 2, 3, 4]</zoom> <answer>B</answer>", 0) == Answer("B", "<zoom>[1, 2, 3, 4]</zoom>")


def test_a_single_turn_has_no_next() -> None:
    """Asking for another turn, or for a fallback, is a mistake of the caller."""
    with pytest.raises(AssertionError):
        SINGLE.next(SINGLE.first(QUESTION, OVERVIEW), "", QUESTION, OVERVIEW)
    with pytest.raises(AssertionError):
        SINGLE.on_malformed(Malformed(MalformedReason.MISSING), IMAGE)


# --- cut ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("edges", "space", "box", "clamped"),
    [
        ((10, 20, 30, 40), Space.SEEN, Box(40, 80, 120, 160), False),
        ((10.5, 20.9, 29.1, 39.5), Space.SEEN, Box(40, 80, 120, 160), False),
        ((0, 0, 1000, 500), Space.SEEN, Box(0, 0, 4000, 2000), False),
        ((-5, -5, 10, 10), Space.SEEN, Box(0, 0, 40, 40), True),
        ((990, 490, 5000, 9e99), Space.SEEN, Box(3960, 1960, 4000, 2000), True),
        ((-math.inf, -math.inf, math.inf, math.inf), Space.SEEN, Box(0, 0, 4000, 2000), True),
        ((0.25, 0.5, 0.5, 1.0), Space.UNIT, Box(1000, 1000, 2000, 2000), False),
        ((0.25, 0.5, 0.5, 1.5), Space.UNIT, Box(1000, 1000, 2000, 2000), True),
        ((250, 500, 500, 1000), Space.PER_MILLE, Box(1000, 1000, 2000, 2000), False),
        ((7, 7, 7.5, 7.5), Space.SEEN, Box(28, 28, 32, 32), False),
        ((0, 100, 1000, 101), Space.SEEN, Box(0, 392, 4000, 412), False),  # 4000 x 4 pixels, widened to 200 : 1
    ],
)
def test_worked_regions(edges: Edges, space: Space, box: Box, clamped: bool) -> None:
    """Boxes in all three frames, mapped by hand to an image four times as large as its overview."""
    assert region(edges, space) == Region(box, clamped)


@pytest.mark.parametrize(
    ("edges", "reason"),
    [
        ((30, 20, 10, 40), "inverted"),
        ((10, 40, 30, 20), "inverted"),
        ((10, 20, 10, 40), "empty"),
        ((10, 20, 30, 20), "empty"),
        ((0, 0, 0, 0), "empty"),
        ((1000, 0, 1100, 50), "outside"),
        ((0, 500, 50, 600), "outside"),
        ((-50, 0, 0, 50), "outside"),
        ((0, -50, 50, -1), "outside"),
        ((math.nan, 0, 1, 1), "not_numbers"),
        ((0, 0, 1, math.nan), "not_numbers"),
        ((math.inf, 0, math.inf, 1), "empty"),
        ((math.inf, 0, -math.inf, 1), "inverted"),
        ((1e300, 0, 1e301, 1), "outside"),
    ],
)
@pytest.mark.parametrize("space", Space)
def test_worked_refusals(edges: Edges, reason: str, space: Space) -> None:
    """Inverted, empty, outside and not-a-number boxes say so, in every frame."""
    scale = {Space.SEEN: (1, 1), Space.UNIT: (1 / 1000, 1 / 500), Space.PER_MILLE: (1, 2)}[space]
    x1, y1, x2, y2 = (edge * scale[i % 2] for i, edge in enumerate(edges))
    assert region((x1, y1, x2, y2), space) == Malformed(MalformedReason(reason))


@pytest.mark.parametrize(
    ("reply", "outcome"),
    [
        ("no idea", Malformed(MalformedReason.MISSING)),
        ("<zoom>[a, b, c, d]</zoom>", Malformed(MalformedReason.NOT_NUMBERS)),
        ("<zoom>[nan, nan, nan, nan]</zoom>", Malformed(MalformedReason.NOT_NUMBERS)),
        ("<zoom>[30, 20, 10, 40]</zoom>", Malformed(MalformedReason.INVERTED)),
        ("<zoom>[10, 20, 10, 40]</zoom>", Malformed(MalformedReason.EMPTY)),
        ("<zoom>[1000, 0, 1100, 50]</zoom>", Malformed(MalformedReason.OUTSIDE)),
        ("<zoom>[10, 20, 999999999, 40]</zoom>", Region(Box(40, 80, 4000, 160), clamped=True)),
        ("<zoom>[10, 20, 30, 40]</zoom>", Region(Box(40, 80, 120, 160), clamped=False)),
    ],
)
def test_from_reply_to_region(reply: str, outcome: Region | Malformed) -> None:
    """What the model wrote becomes a region, or the documented reason why there is none."""
    zoom = parse_zoom(reply)
    assert (cut(zoom, WHOLE, IMAGE, CropRule()) if isinstance(zoom, Zoom) else zoom) == outcome


@st.composite
def looked_at(draw: st.DrawFn) -> tuple[Size, tuple[Seen, ...]]:
    """Draw an image with its overview and one crop of it, as a policy of several turns has seen them."""
    longer = draw(st.integers(1, 5000))
    image = Size(longer, draw(st.integers(-(-longer // 200), longer)))[:: draw(st.sampled_from((1, -1)))]
    size, budget = Size(*image), PixelBudget(draw(st.integers(4, 1280)))
    x1, y1 = draw(st.integers(0, size.width - 1)), draw(st.integers(0, size.height - 1))
    box = Box(x1, y1, draw(st.integers(x1 + 1, size.width)), draw(st.integers(y1 + 1, size.height))).grown(0, 0, 1, size)
    return size, tuple(Seen(View(b"", budget.view_size(shown.size)), shown) for shown in (Box.whole(size), box))


@given(
    looked_at(),
    st.tuples(EDGES, EDGES, EDGES, EDGES),
    st.sampled_from(Space),
    st.integers(0, 1),
    st.floats(0, 1),
    st.integers(1, 300),
)
def test_any_box_is_a_region_that_can_be_sent_or_malformed(
    seen: tuple[Size, tuple[Seen, ...]],
    edges: Edges,
    space: Space,
    view: int,
    pad: float,
    min_side: int,
) -> None:
    """Any numbers in any frame give a region inside the image, not empty, within 200 : 1, or a reason; nothing raises."""
    image, views = seen
    found = cut(Zoom(edges, space, view), views, image, CropRule(pad, min_side))
    if isinstance(found, Region):
        assert found.box.clamp(image) == found.box
        assert max(found.box.size) <= 200 * min(found.box.size)


@given(looked_at(), st.sampled_from(Space))
def test_the_whole_view_is_the_region_it_shows(seen: tuple[Size, tuple[Seen, ...]], space: Space) -> None:
    """A box around all of a view, in any frame, gives exactly the region that the view shows, of overview and crop alike."""
    image, views = seen
    for index, source in enumerate(views):
        end = {Space.SEEN: source.view.size, Space.UNIT: (1, 1), Space.PER_MILLE: (1000, 1000)}[space]
        found = cut(Zoom((0, 0, *end), space, index), views, image, CropRule())
        assert isinstance(found, Region)
        assert found.box == source.region


def test_a_box_in_a_crop_is_mapped_through_the_crop() -> None:
    """A box in the second view is relative to the region that view shows, in every frame."""
    views = (*WHOLE, Seen(View(b"crop", Size(560, 280)), Box(1000, 400, 2120, 960)))
    for zoom in (
        Zoom((70, 70, 280, 210), Space.SEEN, view=1),
        Zoom((0.125, 0.25, 0.5, 0.75), Space.UNIT, view=1),
        Zoom((125, 250, 500, 750), Space.PER_MILLE, view=1),
    ):
        assert cut(zoom, views, IMAGE, CropRule()) == Region(Box(1140, 540, 1560, 820), clamped=False)


def test_a_rule_pads_by_the_image_and_widens_to_its_least_side() -> None:
    """Padding is a fraction of the image's own sides; sides that are too short grow about their middle."""
    assert region((500, 250, 510, 260), pad=0.1) == Region(Box(1600, 800, 2440, 1240), clamped=False)
    assert region((500, 250, 510, 260), min_side=100) == Region(Box(1970, 970, 2070, 1070), clamped=False)
