"""Any text is a reply: every outcome is a value, and streaming cannot disagree with reading the whole."""

from __future__ import annotations

import gc
import itertools
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ergo_server.protocol.base import Answer, Malformed, MalformedReason, Space, Zoom
from ergo_server.protocol.replies import AnswerReader, parse_answer, parse_zoom

TAGS = ("<think>", "</think>", "<answer>", "</answer>", "<zoom>", "</zoom>")
OTHER = ("<", "</", "<ans", "wer>", "think", ">", " ", "\n", "B", "red", "[1, 2, 3, 4]", "1e5", "-3.5", "nan", "\u0661")
REPLIES = st.lists(st.sampled_from(TAGS + OTHER) | st.text(max_size=5), max_size=20).map("".join)
LONG = [*TAGS, "<think>a</think>", "1", "1,", "<", " ", "a ", "<zoom>[1, 2, 3, 4]", "<zoom>\n"]


def streamed(pieces: list[str]) -> tuple[Answer, str, str]:
    """Feed a reply in pieces; return the answer, and the text of all reasoning and all answer pieces."""
    reader = AnswerReader()
    found = [piece for text in pieces for piece in reader.feed(text)] + reader.finish()
    texts = {kind: "".join(piece.text for piece in found if piece.kind == kind) for kind in ("reasoning", "answer")}
    return reader.answer, texts["reasoning"], texts["answer"]


def pieces_of(text: str, cuts: list[int]) -> list[str]:
    """Cut a text at some places."""
    places = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    return [text[start:end] for start, end in itertools.pairwise(places)]


@pytest.mark.parametrize(
    ("reply", "edges"),
    [
        ("<think>left</think><zoom>[10, 20, 30, 40]</zoom>", (10, 20, 30, 40)),
        ("<zoom>[10,20,30,40]</zoom>", (10, 20, 30, 40)),
        ("<zoom>[1, 2, 3, 4]</zoom> or <zoom>[5, 6, 7, 8]</zoom>", (1, 2, 3, 4)),
        ("<zoom>[30, 40, 10, 20]</zoom>", (30, 40, 10, 20)),
    ],
)
def test_the_trained_form_is_read_exactly(reply: str, edges: tuple[float, ...]) -> None:
    """Four whole numbers in brackets inside the first tag are the box, in pixels of the view."""
    assert parse_zoom(reply) == Zoom((edges[0], edges[1], edges[2], edges[3]), Space.SEEN)


@pytest.mark.parametrize(
    ("reply", "edges"),
    [
        ("<zoom>[ 1 , 2 , 3 , 4 ]</zoom>", (1, 2, 3, 4)),
        ("<zoom>[1.5, 2.25, 3., .5]</zoom>", (1.5, 2.25, 3, 0.5)),
        ("<zoom>[-1, +2, 3, 4]</zoom>", (-1, 2, 3, 4)),
        ("<zoom>(1, 2, 3, 4)</zoom>", (1, 2, 3, 4)),
        ("<zoom>1 2 3 4</zoom>", (1, 2, 3, 4)),
        ("<zoom>[1, 2], [3, 4]</zoom>", (1, 2, 3, 4)),
        ("<zoom>\n[1, 2, 3, 4]\n</zoom>", (1, 2, 3, 4)),
        ("<zoom>[1, 2, 3, 4]", (1, 2, 3, 4)),
        ("<ZOOM>[1, 2, 3, 4]</Zoom>", (1, 2, 3, 4)),
        ("<zoom><zoom>[1, 2, 3, 4]</zoom>", (1, 2, 3, 4)),
        ("<zoom>[999999999999, 0, 1, 2]</zoom>", (999999999999, 0, 1, 2)),
    ],
)
def test_stray_forms_are_understood_and_marked(reply: str, edges: tuple[float, ...]) -> None:
    """Floats, signs, spaces, other brackets and a missing end are read, and said to be lenient."""
    assert parse_zoom(reply) == Zoom((edges[0], edges[1], edges[2], edges[3]), Space.SEEN, lenient=True)


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        ("", "missing"),
        ("I see it at [1, 2, 3, 4].", "missing"),
        ("</zoom>[1, 2, 3, 4]<zoo", "missing"),
        ("<zoom>", "not_numbers"),
        ("<zoom></zoom>", "not_numbers"),
        ("<zoom>the dog</zoom>", "not_numbers"),
        ("<zoom>[1, 2, 3]</zoom>", "not_numbers"),
        ("<zoom>[1, 2, 3, 4, 5]</zoom>", "not_numbers"),
        ("<zoom>[1, 2, 3, 4][5, 6, 7, 8]</zoom>", "not_numbers"),
        ("<zoom>[nan, 2, 3, 4]</zoom>", "not_numbers"),
        ("<zoom>[1, 2, inf, 4]</zoom>", "not_numbers"),
        ("<zoom>[1e9, 2, 3, 4]</zoom>", "not_numbers"),
        ("<zoom>[1, 2, 3, 9999999999999]</zoom>", "not_numbers"),
        ("<zoom>[1.2.3, 2, 3, 4]</zoom>", "not_numbers"),
        ("<zoom>the dog</zoom> I mean <zoom>[1, 2, 3, 4]</zoom>", "not_numbers"),
    ],
)
def test_a_reply_without_a_box_says_why(reply: str, reason: str) -> None:
    """No tag is missing; a tag without exactly four plain numbers is not_numbers; the first tag counts."""
    assert parse_zoom(reply) == Malformed(MalformedReason(reason))


@given(REPLIES)
def test_any_reply_has_a_meaning(reply: str) -> None:
    """Whatever the text, both parsers return a value and never raise."""
    zoom = parse_zoom(reply)
    assert isinstance(zoom, Zoom | Malformed)
    assert isinstance(zoom, Malformed) or all(abs(edge) < 1e12 for edge in zoom.edges)
    assert isinstance(parse_answer(reply), Answer)


def seconds(reply: str) -> float:
    """Return the processor time of reading a reply in every way."""
    gc.disable()  # what it costs depends on all that other tests have left in memory
    started = time.thread_time()
    parse_zoom(reply)
    parse_answer(reply)
    parse_answer("<answer>" + reply)
    taken = time.thread_time() - started
    gc.enable()
    return taken


@pytest.mark.parametrize("unit", LONG)
def test_hostile_repetition_takes_linear_time(unit: str) -> None:
    """A hundred thousand characters of anything take about ten times as long as ten thousand, not a hundred times."""
    count = 10_000 // len(unit)
    assert seconds(unit * (10 * count)) < 40 * max(seconds(unit * count), 0.005)


@pytest.mark.parametrize(
    ("reply", "answer", "reasoning", "tagged"),
    [
        ("<think>It is blue.</think> <answer> B </answer>", "B", "It is blue.", True),
        ("<think>It is blue.<think><answer>B</answer>", "B", "It is blue.", True),
        ("<think>It is blue.<answer>B</answer>", "B", "It is blue.", True),
        ("<think>a</think><think>b</think><answer>B</answer>", "B", "ab", True),
        ("Blue, then. <answer>B</answer>", "B", "Blue, then.", True),
        ("<answer>B", "B", "", True),
        ("<answer>B</answer> so B</answer><answer>C</answer>", "B", "", True),
        ("<answer></answer>", "", "", True),
        ("<answer><think>x</think></answer>", "<think>x</think>", "", True),
        ("B", "B", "", False),
        ("  B\n", "B", "", False),
        ("", "", "", False),
        ("<think>It is</think> B", "B", "It is", False),
        ("<think>It is<think> B", "B", "It is", False),
        ("<think>cut off", "", "cut off", False),
        ("It is blue.</think><answer>B</answer>", "B", "It is blue.", True),
        ("a < b </answer>", "a < b </answer>", "", False),
        ("B<ans", "B<ans", "", False),
        ("<zoom>[1, 2, 3, 4]</zoom>", "<zoom>[1, 2, 3, 4]</zoom>", "", False),
    ],
)
def test_answers(reply: str, answer: str, reasoning: str, tagged: bool) -> None:
    """The text in the first answer tag is the answer; without one, what stands outside the thinking."""
    assert parse_answer(reply) == Answer(answer, reasoning, tagged)


@given(REPLIES, st.lists(st.integers(0, 500), max_size=10))
def test_any_chunking_gives_the_same_answer(reply: str, cuts: list[int]) -> None:
    """Fed in any pieces, a reply gives the answer that the whole gives, and its pieces joined are that answer."""
    whole = parse_answer(reply)
    assert streamed(pieces_of(reply, cuts)) == (whole, whole.reasoning, whole.text)


@given(REPLIES)
def test_single_characters_give_the_same_answer(reply: str) -> None:
    """Fed one character at a time, a reply gives the answer that the whole gives."""
    whole = parse_answer(reply)
    assert streamed(list(reply)) == (whole, whole.reasoning, whole.text)


@given(REPLIES)
def test_an_answer_has_no_white_space_around_it(reply: str) -> None:
    """Answer and reasoning are stripped."""
    found = parse_answer(reply)
    assert (found.text, found.reasoning) == (found.text.strip(), found.reasoning.strip())


def test_an_answer_is_passed_on_as_soon_as_it_is_certain() -> None:
    """Answer text arrives with its piece; only what could begin a tag, and white space, waits."""
    reader = AnswerReader()
    pieces = ("<think>So", " it", "</think><answer>re", "d <", "/answer>")
    assert [[(piece.kind, piece.text) for piece in reader.feed(text)] for text in pieces] == [
        [("reasoning", "So")],
        [("reasoning", " it")],
        [("answer", "re")],
        [("answer", "d")],
        [],
    ]
    assert reader.finish() == []
    assert reader.answer == Answer("red", "So it", True)


def test_untagged_text_waits_for_the_end() -> None:
    """Text outside every tag could be reasoning or the answer, so nothing is said until it is certain."""
    reader = AnswerReader()
    assert reader.feed("It is red.") == []
    assert [(piece.kind, piece.text) for piece in reader.finish()] == [("answer", "It is red.")]
