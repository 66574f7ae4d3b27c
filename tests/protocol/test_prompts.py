"""Prompts are data: filled in one pass, read from TOML, imported from code that is never run."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ergo_server.protocol.base import ModelProfile, Question
from ergo_server.protocol.prompts import PromptsError, builtin_profile, fill, import_prompts, load_profile, read_profile

QUESTION = Question("What is it?", ("red", "blue"), "Answer with the letter.")
ALL = "{question}{choices}{instructions}"
FILE = """
[zoom]
system = "s"
user = "{question} z"
[answer]
user = "{question} a"
[single]
system = "t"
user = "{question} u"
"""


def python_file(system: str, zoom: str, answer: str) -> str:
    """Return Python source with the constants of ERGO's published evaluation code."""
    return f"import os\nSYSTEM_PROMPT = {system!r}\nQUESTION_TEMPLATE1 = {zoom!r}\nQUESTION_TEMPLATE2: str = {answer!r}\n"


def test_choices_and_instructions_are_lines_of_their_own() -> None:
    """Every choice is one lettered line after the question, the instructions one line after the choices."""
    assert fill(ALL, QUESTION, choices=True) == "What is it?\n(A) red\n(B) blue\nAnswer with the letter."
    assert fill(ALL, Question("Why?"), choices=True) == "Why?"


def test_choices_can_be_kept_back() -> None:
    """Without choices, neither choices nor instructions are shown, even by a template that asks for them."""
    assert fill(ALL, QUESTION, choices=False) == "What is it?"


def test_labels_of_the_caller_are_shown() -> None:
    """Choices carry the caller's own letters."""
    assert fill("{choices}", Question("?", ("left", "right"), labels=("L", "R")), choices=True) == "\n(L) left\n(R) right"


@pytest.mark.parametrize("text", ["{choices}", "{question}", "{instructions}", r"\1 \g<0>", "{}", "{0}", "%s"])
def test_nothing_in_a_question_is_expanded(text: str) -> None:
    """A question, choice or instruction that spells a field is shown as it was written."""
    question = Question(text, (text,), text)
    assert fill(ALL, question, choices=True) == f"{text}\n(A) {text}\n{text}"


def test_other_braces_in_a_template_stay() -> None:
    """Only the three fields are filled in."""
    assert fill('{"box": [{x1}]} {question} {}', Question("?"), choices=True) == '{"box": [{x1}]} ? {}'


def test_the_builtin_profile_has_the_papers_budgets() -> None:
    """The profile of ERGO-7B allows 640 and 1280 visual tokens, and its zoom turn has no place for choices."""
    profile = builtin_profile()
    assert (profile.default_visual_tokens, profile.max_visual_tokens) == (640, 1280)
    assert "{choices}" not in profile.prompts.zoom_user
    assert all(tag in profile.prompts.zoom_user for tag in ("<think>", "</think>", "<zoom>", "</zoom>"))
    assert all(tag in profile.prompts.answer_user for tag in (ALL, "<think>", "</think>", "<answer>", "</answer>"))


def test_a_file_without_a_budget_has_ergos() -> None:
    """The budget section may be left out."""
    profile = read_profile(FILE, source="here")
    assert (profile.default_visual_tokens, profile.max_visual_tokens, profile.source) == (640, 1280, "here")


def test_the_prompts_of_ergo_mini_are_readable() -> None:
    """The prompts file that is shipped beside our own checkpoint is valid."""
    path = Path(__file__).parents[2] / "models" / "ergo_mini" / "prompts.toml"
    assert load_profile(path).default_visual_tokens == 49


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", r"\[zoom\] system is missing"),
        ("not toml", "here:"),
        ("zoom = 3", r"\[zoom\] system is missing"),
        (FILE.replace('"s"', "3"), r"\[zoom\] system is missing or is no string"),
        (FILE.replace('user = "{question} a"', ""), r"\[answer\] user is missing"),
        (FILE.replace("{question} z", "z"), r"\[zoom\] user lacks \{question\}"),
        (FILE.replace("{question} u", "{Question}"), r"\[single\] user lacks"),
        ("budget = 3\n" + FILE, "budget is no table"),
        (FILE + "[budget]\ndefault = 640", r"\[budget\] .* is missing"),
        (FILE + "[budget]\ndefault = 640.5\nlargest = 1280", r"\[budget\] .* no whole number"),
        (FILE + '[budget]\ndefault = "640"\nlargest = 1280', r"\[budget\]"),
        (FILE + "[budget]\ndefault = 3\nlargest = 1280", r"\[budget\] .* between 4"),
        (FILE + "[budget]\ndefault = 640\nlargest = 99999", r"\[budget\] .* 16384"),
        (FILE + "[budget]\ndefault = 1280\nlargest = 640", r"\[budget\] default is above largest"),
    ],
)
def test_an_unusable_file_is_refused_with_the_place(text: str, complaint: str) -> None:
    """Whatever is wrong, the error is PromptsError and names the file and the entry."""
    with pytest.raises(PromptsError, match=f"here: .*{complaint}|{complaint}"):
        read_profile(text, source="here")


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    """A missing file and one that is not UTF-8 raise PromptsError with their path."""
    (tmp_path / "latin").write_bytes(b"\xff\xfe")
    for name in ("missing", "latin"):
        with pytest.raises(PromptsError, match=name):
            load_profile(tmp_path / name)


def test_constants_of_a_python_file_are_imported() -> None:
    """Plain, annotated, triple-quoted and adjacent string constants are found; other statements do not matter."""
    source = '''
import torch
SYSTEM_PROMPT = """Look
closely."""
QUESTION_TEMPLATE1 = ("Where is it? " 'It\\'s {Question}\\n')
QUESTION_TEMPLATE2: str = "{Question} So?"
class Other: SYSTEM_PROMPT = "no"
def f(): return SYSTEM_PROMPT + 1
'''
    prompts = read_profile(import_prompts(source, source="const.py"), source="made").prompts
    assert prompts.zoom_system == "Look\nclosely."
    assert prompts.zoom_user == "Where is it? It's {question}\n"
    assert prompts.answer_user == "{question}{choices}{instructions} So?"


def test_a_python_file_is_never_run(tmp_path: Path) -> None:
    """Importing from a file that would write a marker file leaves none, whatever statement would write it."""
    marker = tmp_path / "marker"
    touch = f"__import__('pathlib').Path({str(marker)!r}).touch()"
    source = f"{touch}\nX = {touch}\nclass C:\n    {touch}\n@(lambda f: {touch})\ndef f(x={touch}): ...\n"
    made = import_prompts(source + python_file("s", "{} z", "{} a"), source="const.py")
    assert read_profile(made, source="made").prompts.zoom_user == "{question} z"
    assert not marker.exists()
    exec(source)
    assert marker.exists()


@pytest.mark.parametrize("field", ["{question}", "{Question}", "{QUESTION}", "{}", "%s"])
def test_every_usual_spelling_of_the_field_is_understood(field: str) -> None:
    """Whatever the authors called it, the field becomes the question."""
    made = import_prompts(python_file("s", f"{field} z", f"{field} a"), source="x.py")
    prompts = read_profile(made, source="made").prompts
    assert (prompts.zoom_user, prompts.answer_user) == ("{question} z", ALL + " a")


def test_constants_of_a_toml_file_are_imported() -> None:
    """A file named .toml is read as TOML, where single quotes keep a backslash."""
    text = "a = 's'\nb = '{} \\n'\nc = \"{} \\n\""
    made = import_prompts(text, source="p.toml", zoom_system="a", zoom_user="b", answer_user="c")
    prompts = read_profile(made, source="made").prompts
    assert (prompts.zoom_user, prompts.answer_user) == ("{question} \\n", ALL + " \n")


def test_a_python_file_that_is_also_toml_is_read_as_python() -> None:
    """In a Python file of plain assignments, a line break in single quotes is a line break."""
    made = import_prompts("SYSTEM_PROMPT = 'a\\nb'\nQUESTION_TEMPLATE1 = '{}'\nQUESTION_TEMPLATE2 = '{}'", source="const.py")
    assert read_profile(made, source="made").prompts.zoom_system == "a\nb"


def test_missing_constants_are_named_with_those_found() -> None:
    """The error lists what is missing and what there is, as the names differ from one code base to the next."""
    with pytest.raises(PromptsError, match=r"SYSTEM_PROMPT, QUESTION_TEMPLATE1, QUESTION_TEMPLATE2; found OTHER, PROMPT"):
        import_prompts("PROMPT = OTHER = 'x'\nSYSTEM_PROMPT = 3\nQUESTION_TEMPLATE1 = f'{PROMPT}'", source="const.py")


@pytest.mark.parametrize(("text", "name"), [("def (", "a.py"), ("\0", "a.py"), ("[", "a.toml"), ("", "a.py"), ("", "a.toml")])
def test_a_file_that_holds_nothing_is_refused(text: str, name: str) -> None:
    """Neither broken nor empty files are imported."""
    with pytest.raises(PromptsError, match=name):
        import_prompts(text, source=name)


def test_a_template_without_a_question_is_not_imported() -> None:
    """A template that has no place for the question is refused when it is imported, not when the server starts."""
    with pytest.raises(PromptsError, match=r"lacks \{question\}"):
        import_prompts(python_file("s", "where?", "{}"), source="const.py")


@given(st.text(), st.text(), st.text())
def test_any_text_survives_the_round_trip(system: str, zoom: str, answer: str) -> None:
    """Quotes, backslashes, control characters and emoji come out of the made file as they went in."""
    made = import_prompts(python_file(system, "{question}" + zoom, "{question}" + answer), source="const.py")
    tomllib.loads(made)
    profile: ModelProfile = read_profile(made, source="made")
    assert profile.prompts.zoom_system == system
    assert fill(profile.prompts.zoom_user, Question("{}%s"), choices=False).startswith("{}%s")
    assert profile.prompts.single_user == builtin_profile().prompts.single_user
