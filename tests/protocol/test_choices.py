"""Options taken out of questions, and options found in answers, in the forms that real evaluators use."""

from __future__ import annotations

import gc
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ergo_server.protocol.base import Question
from ergo_server.protocol.choices import choose, split_choices
from ergo_server.protocol.replies import parse_answer

COLOURS = Question("Which colour?", ("red", "blue", "green", "yellow"))
WORDS = st.text("abcdefgh", min_size=1, max_size=8)


@pytest.mark.parametrize(
    ("text", "stem", "choices", "instructions"),
    [
        (  # V* by lmms-eval
            "What is it?\nA. red\nB. blue\nAnswer with the option's letter directly.\nAnswer with the letter.",
            "What is it?",
            ("red", "blue"),
            "Answer with the option's letter directly.\nAnswer with the letter.",
        ),
        (  # V* as published
            "What is it?\n(A) red\n(B) blue\nAnswer with the option's letter from the given choices directly.",
            "What is it?",
            ("red", "blue"),
            "Answer with the option's letter from the given choices directly.",
        ),
        (  # V* and TreeBench by VLMEvalKit
            "Question: What is it?\nOptions:\nA. red\nB. blue\nC. green\n"
            "Please select the correct answer from the options above. \n",
            "What is it?",
            ("red", "blue", "green"),
            "Please select the correct answer from the options above.",
        ),
        (  # HR-Bench by lmms-eval
            "What is it?\nA. red\nB. blue\nC. green\nD. grey\nAnswer the option letter directly.",
            "What is it?",
            ("red", "blue", "green", "grey"),
            "Answer the option letter directly.",
        ),
        ("What is it?\nA:red\nB:blue", "What is it?", ("red", "blue"), ""),  # HR-Bench by ERGO
        (  # MME-RealWorld
            "What is it? The choices are listed below:\n(A) red\n(B) blue\n(E) none\nSelect the best answer. The best answer is:",
            "What is it?",
            ("red", "blue"),
            "(E) none\nSelect the best answer. The best answer is:",
        ),
        (
            "What is it? The choices are listed below:\n"
            "(A) red\n(B) blue\n(C) green\n(D) grey\n(E) It is not there.\nThe best answer is:",
            "What is it?",
            ("red", "blue", "green", "grey", "It is not there."),
            "The best answer is:",
        ),
        ("Look.\nWhat is it?\n  A) red  \n  B) blue\t\n", "Look.\nWhat is it?", ("red", "blue"), ""),
        ("What is it?\r\nA. red\r\nB. blue\r\nAnswer.", "What is it?", ("red", "blue"), "Answer."),
        ("A. Einstein is where?\nA. left\nB. right", "A. Einstein is where?", ("left", "right"), ""),
    ],
)
def test_layouts_of_the_evaluators(text: str, stem: str, choices: tuple[str, ...], instructions: str) -> None:
    """Question, options and instructions are told apart in each layout."""
    question = split_choices(text)
    assert (question.text, question.choices, question.instructions) == (stem, choices, instructions)
    assert question.labels == tuple("ABCDE"[: len(choices)])


@pytest.mark.parametrize(
    "text",
    [
        "",
        "What is it?",
        "A. red\nB. blue",
        "What?\nA. only one",
        "What?\nB. red\nC. blue",
        "What?\nA. red\nC. blue",
        "What?\nA. red\n\nor\nB. blue",
    ],
)
def test_other_text_has_no_choices(text: str) -> None:
    """Without a question and two lines lettered from A without a gap, the text is the question, whole."""
    assert split_choices(text) == Question(text.strip())


@given(st.lists(WORDS, min_size=2, max_size=26), WORDS, st.sampled_from(["{}. {}", "({}) {}", "{}) {}", "{}:{}"]))
def test_any_options_are_found(choices: list[str], stem: str, form: str) -> None:
    """Two to twenty-six options in any usual form come out as they went in."""
    lines = [form.format(letter, choice) for letter, choice in zip("ABCDEFGHIJKLMNOPQRSTUVWXYZ", choices, strict=False)]
    question = split_choices("\n".join([stem + "?", *lines, "Answer."]))
    assert (question.text, question.choices, question.instructions) == (stem + "?", tuple(choices), "Answer.")


@given(st.text(), st.text("AB.) \n:(x"))
def test_any_text_can_be_split(text: str, optionlike: str) -> None:
    """Splitting and choosing never raise, and labels match choices."""
    question = split_choices(text + optionlike)
    assert len(question.labels) == len(question.choices)
    chosen = choose(optionlike, question)
    assert chosen is None or 0 <= chosen < len(question.choices)


def seconds(long: str) -> float:
    """Return the processor time of a long text before, in and after the options, and as the answer."""
    gc.disable()  # what it costs depends on all that other tests have left in memory
    started = time.thread_time()
    for text in (f"Q{long}q\nA. x\nB. y", f"Q\nA. x{long}x\nB. y", f"Q\nA. x\nB. y\n{long}"):
        choose(long, split_choices(text))
    taken = time.thread_time() - started
    gc.enable()
    return taken


@pytest.mark.parametrize("filler", [" ", "\t", "a ", "\n", "the options", "A. ", "A. x\n", "choices are listed below "])
def test_hostile_questions_take_linear_time(filler: str) -> None:
    """Ten times the text takes about ten times as long, not a hundred times."""
    count = 10_000 // len(filler)
    assert seconds(filler * (10 * count)) < 40 * max(seconds(filler * count), 0.005)


@pytest.mark.parametrize(
    ("reply", "choice"),
    [
        ("C", 2),
        ("c", 2),
        ("(C)", 2),
        ("C.", 2),
        ("C. green", 2),
        ("(C) green", 2),
        ("green", 2),
        ("The answer is C.", 2),
        ("The answer is green.", 2),
        ("Answer: C", 2),
        ("**C**", 2),
        (r"\boxed{C}", 2),
        ("<answer>C</answer>", 2),
        ("<answer> (C) </answer>", 2),
        ("<answer>C. green</answer>", 2),
        ("<answer>green</answer>", 2),
        ("<think> The marker is small. </think><answer>C</answer>", 2),
        ("<think> The wall is red. It is small. </think> <answer> C </answer>", 2),
        ("<think> A person stands by Door B. </think> <answer> C </answer>", 2),
        ("Based on the image, the answer is C.", 2),
        ("A closer look shows green, so C", 2),
        ("Cannot determine the answer", None),
        ("", None),
    ],
)
def test_replies_that_six_scoring_rules_disagree_on(reply: str, choice: int | None) -> None:
    """Each reply of the survey of scoring rules means the option that a person would read from it."""
    assert choose(parse_answer(reply).text, COLOURS) == choice


@pytest.mark.parametrize(
    ("answer", "choices", "choice"),
    [
        ("The answer is a dog.", ("cat", "dog"), 1),
        ("The correct option is b.", ("cat", "dog"), 1),
        ("ANSWER: B", ("cat", "dog"), 1),
        ("The answer is A or the answer is B", ("cat", "dog"), None),
        ("It is a cat, not a dog.", ("cat", "dog"), None),
        ("Dog!", ("cat", "dog"), 1),
        ("A concatenated word", ("cat", "dog"), None),
        ("The answer is D.", ("cat", "dog"), None),
        ("-5", ("5", "-5"), 1),
        ("+", ("+", "-"), 0),
        ("", ("+", "red"), None),
        ("...", ("+", "red"), None),
        ("B", (), None),
        ("B", ("same", "same"), 1),
        ("same", ("same", "same"), None),
        ("No", ("Yes", "No"), 1),
        ("[B]", ("Yes", "No"), 1),
        ("'B'", ("Yes", "No"), 1),
    ],
)
def test_answers_in_words(answer: str, choices: tuple[str, ...], choice: int | None) -> None:
    """Letters, words and symbols are told apart; an answer that names none or several options names none."""
    assert choose(answer, Question("?", choices)) == choice


@given(st.lists(WORDS, min_size=2, max_size=26), st.data())
def test_the_bare_letter_always_means_its_option(choices: list[str], data: st.DataObject) -> None:
    """Whatever the options are, a letter in any usual dress means its own."""
    index = data.draw(st.integers(0, len(choices) - 1))
    dress = data.draw(st.sampled_from(["{}", "({})", "{}.", "{})", "**{}**", "{}:", " {} \n", "`{}`"]))
    assert choose(dress.format(chr(ord("A") + index)), Question("?", tuple(choices))) == index


def test_the_callers_own_labels_count() -> None:
    """Letters that the caller gave are the ones that are understood."""
    question = Question("?", ("left", "right"), labels=("L", "R"))
    assert (choose("R", question), choose("(l)", question), choose("A", question)) == (1, 0, None)
