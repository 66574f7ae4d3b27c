"""Multiple choice: taking the options out of a question, and finding the option that an answer means.

The zoom turn is asked without the options (the paper's protocol), so an OpenAI client's single blob of text has to be taken
apart. The forms read here are those that the evaluation harnesses in use were seen to send.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from ergo_server.protocol.base import Question

_OPTION = re.compile(r"^[ \t]*(?:\(([A-Z])\)[ \t]*|([A-Z])[.):][ \t]*)(\S.*)$", re.MULTILINE)
_LEAD = re.compile(r"(?:^|\n)[ \t]*(?:the )?(?:options|choices)(?: are listed below)?:?[ \t]*$", re.IGNORECASE)
_INLINE_LEAD = re.compile(r"(?:the )?(?:options|choices) are listed below:?[ \t]*$", re.IGNORECASE)
_QUESTION_LEAD = re.compile(r"^\s*question:[ \t]*", re.IGNORECASE)


def split_choices(text: str) -> Question:
    """Take the options out of a question that lists them on lines of their own, lettered from A without a gap.

    What stands before them is the question, what follows them the instructions. Text without at least two such lines is a
    question without choices.

    >>> split_choices("What colour is it?\\nA. red\\nB. blue\\nAnswer with the letter.")
    Question(text='What colour is it?', choices=('red', 'blue'), instructions='Answer with the letter.', labels=('A', 'B'))
    """
    options = list(_OPTION.finditer(text))
    run: list[re.Match[str]] = []
    for option in options:
        letter = option[1] or option[2]
        if letter == chr(ord("A") + len(run)):
            run.append(option)
        elif letter == "A":
            run = [option]
    if len(run) < 2 or text[run[0].end() : run[-1].start()].count("\n") != len(run) - 1:
        return Question(text.strip())
    stem = text[: run[0].start()].rstrip()
    stem = _QUESTION_LEAD.sub("", _INLINE_LEAD.sub("", _LEAD.sub("", stem))).strip()
    if not stem:
        return Question(text.strip())
    return Question(
        text=stem,
        choices=tuple(option[3].rstrip() for option in run),
        instructions=text[run[-1].end() :].strip(),
        labels=tuple(option[1] or option[2] for option in run),
    )


def choose(answer: str, question: Question) -> int | None:
    """Return the index of the choice that an answer means, or None.

    In order: the bare letter in any usual dress (``C``, ``(C)``, ``C.``, ``**C**``, ``C. green``), the text of exactly one
    choice, one lettered statement ("the answer is C"), the text of exactly one choice somewhere in the answer.

    >>> choose("(B)", Question("?", ("red", "blue")))
    1
    >>> choose("It is blue.", Question("?", ("red", "blue")))
    1
    """
    if not question.choices:
        return None
    letters = "".join(re.escape(label) for label in question.labels)
    plain = answer.strip().strip("*`\"'").strip()
    dressed = re.fullmatch(rf"(?:\\boxed\{{)?[(\[]?([{letters}{letters.lower()}])[)\]}}.:]*", plain)
    lettered = re.match(rf"[(\[]?([{letters}])[)\].:]+\s", plain)
    if found := dressed or lettered:
        return _index(found[1].upper(), question.labels)
    wanted = _words(plain)
    verbatim = [i for i, choice in enumerate(question.choices) if choice.strip() == plain]
    same = [i for i, choice in enumerate(question.choices) if wanted and _words(choice) == wanted]
    for found_in in (verbatim, same):  # by their words, "-5" and "5" are the same choice, and "+" is none
        if len(found_in) == 1:
            return found_in[0]
    # A small letter counts only at the end: "the answer is a dog" does not mean A.
    end = rf"[{letters.lower()}](?=\W*$)"
    stated = re.findall(rf"(?i:answer|option|choice)\s*(?i:is|:)?\s*[(\[*]*([{letters}]\b|{end})", plain)
    if len({letter.upper() for letter in stated}) == 1:
        return _index(stated[0].upper(), question.labels)
    inside = [i for i, choice in enumerate(question.choices) if _words(choice) and f" {_words(choice)} " in f" {wanted} "]
    return inside[0] if len(inside) == 1 else None


def _index(letter: str, labels: Sequence[str]) -> int | None:
    return labels.index(letter) if letter in labels else None


def _words(text: str) -> str:
    return " ".join(re.findall(r"[^\W_]+", text.casefold()))
