"""Many questions at a time."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import io
import itertools
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import support
from asking import picture
from backend import Asked, Blocking, echoes, fails, gives, hangs_up, keeps_silent, serving
from PIL import Image

from ergo_client import Answer, AsyncClient, Client, ClientError, InvalidImage, InvalidRequest, Progress, Question, Unreachable

BOTH = pytest.mark.parametrize("kind", [Client, Blocking])

SCENES = [support.held_out(number, size=(1120, 1120)) for number in range(6)]


def questions(count: int) -> list[Question]:
    """Return questions whose texts are numbers."""
    return [Question(b"x", str(number)) for number in range(count)]


def texts(results: Any) -> list[str]:
    """Return what was answered; the errors' classes among them."""
    return [result.text if isinstance(result, Answer) else type(result).__name__ for result in results]


@BOTH
def test_many_questions_get_the_answers_of_single_ones(embedded: str, kind: Any) -> None:
    """At the real gateway each question of a batch gets the answer that it gets alone."""
    asked = [Question(support.encode(scene), scene.question) for scene in SCENES]
    with kind(embedded) as client:
        results = list(client.ask_many(asked, concurrency=2))
        alone = [client.ask(question.image, question.question) for question in asked]
    assert [(result.text, result.region) for result in results] == [(single.text, single.region) for single in alone]


@BOTH
def test_answers_come_in_the_order_of_the_questions(kind: Any) -> None:
    """A question that takes long does not lose its place."""

    def last_first(asked: Asked) -> None:
        if asked.question == "0":
            asked.wait(lambda: len(asked.server.requests) == 4)
        echoes(asked)

    with serving(last_first) as server, kind(server.url) as client:
        assert texts(client.ask_many(questions(4), concurrency=2)) == ["0", "1", "2", "3"]


@BOTH
@pytest.mark.parametrize("concurrency", [1, 3, 40])
def test_as_many_are_asked_at_a_time_as_was_said(kind: Any, concurrency: int) -> None:
    """The server sees as many requests at a time as ``concurrency`` says, and never more, over as many connections."""

    def together(asked: Asked) -> None:
        if int(asked.question) < concurrency:
            asked.wait(lambda: asked.server.most_in_flight == concurrency)
        echoes(asked)

    with serving(together) as server, kind(server.url) as client:
        assert texts(client.ask_many(questions(3 * concurrency), concurrency=concurrency)) == list(
            map(str, range(3 * concurrency))
        )
    assert server.most_in_flight == server.connections == concurrency


@BOTH
def test_questions_are_taken_when_they_are_needed(kind: Any) -> None:
    """Of an endless source no more is taken than twice the concurrency beyond what was yielded, nothing without a reader."""
    taken = 0

    def endless() -> Iterator[Question]:
        nonlocal taken
        for taken in itertools.count(1):
            yield Question(b"x", str(taken - 1))

    with serving(echoes) as server, kind(server.url) as client:
        results = client.ask_many(endless(), concurrency=3)
        assert taken == 0
        for number in range(20):
            assert next(results).text == str(number)
            assert taken <= number + 1 + 6
        results.close()
        assert taken <= 20 + 6


@BOTH
def test_a_slow_question_does_not_stop_the_others_at_once(kind: Any) -> None:
    """While the first question is slow, the window behind it is worked on, and no more."""

    def first_slow(asked: Asked) -> None:
        if asked.question == "0":
            asked.wait(lambda: len(asked.server.requests) == 6)
        echoes(asked)

    with serving(first_slow) as server, kind(server.url) as client:
        assert len(texts(client.ask_many(questions(12), concurrency=3))) == 12


@BOTH
def test_progress_counts_what_is_yielded(embedded: str, kind: Any) -> None:
    """Progress is told before each result is yielded: how many, how many failed, and the sums of the answers' visual tokens."""
    photo = support.encode(SCENES[0])
    asked = [Question(photo, "?"), Question(b"no image", "?"), Question(photo, "?", max_visual_tokens=16)]
    told: list[Progress] = []
    spent = baseline = 0
    with kind(embedded) as client:
        for number, result in enumerate(client.ask_many(asked, progress=told.append), 1):
            if isinstance(result, Answer):
                spent, baseline = spent + result.visual_tokens.total, baseline + result.visual_tokens.baseline
            assert told[-1] == Progress(number, int(number > 1), spent, baseline)
            assert len(told) == number


@BOTH
def test_a_progress_that_raises_ends_the_batch(kind: Any) -> None:
    """What the callback raises is the caller's, and nothing more is asked."""

    def stop(progress: Progress) -> None:
        raise LookupError

    with serving(echoes) as server, kind(server.url) as client:
        with pytest.raises(LookupError):
            list(client.ask_many(questions(100), progress=stop))
        assert len(server.requests) < 20


@BOTH
def test_a_failure_takes_its_question_only(tmp_path: Path, kind: Any) -> None:
    """Refusals, broken connections, missing files and what is no image are yielded in their places; all others are answered."""
    (tmp_path / "there").write_bytes(b"x")

    def mixed(asked: Asked) -> None:
        {"refused": fails(400, "invalid_request"), "broken": hangs_up}.get(asked.question, echoes)(asked)

    asked: list[tuple[Any, str]] = [
        (tmp_path / "there", "a"),
        (b"x", "refused"),
        (tmp_path / "missing", "?"),
        (tmp_path, "?"),
        (None, "?"),
        (numpy.zeros((2, 2)), "?"),
        (b"x", "broken"),
        (b"x", "b"),
    ]
    with serving(mixed) as server, kind(server.url, max_retries=0) as client:
        results = list(client.ask_many(Question(image, text) for image, text in asked))
    assert texts(results) == ["a", "InvalidRequest", *4 * ["InvalidImage"], "Unreachable", "b"]
    missing = results[2]
    assert isinstance(missing, InvalidImage)
    assert isinstance(missing.__cause__, FileNotFoundError)
    assert (missing.status, missing.code, missing.param) == (0, "image_unreadable", "image")
    assert [type(result.__cause__) for result in results[3:6]] == [IsADirectoryError, TypeError, ValueError]
    assert isinstance(results[1], InvalidRequest)
    assert isinstance(results[6], Unreachable)


@BOTH
def test_a_file_that_goes_while_it_waits(tmp_path: Path, kind: Any) -> None:
    """A file that is gone at the second attempt fails its question, not the batch."""
    path = tmp_path / "file"
    path.write_bytes(b"x")

    def busy(asked: Asked) -> None:
        path.unlink(missing_ok=True)
        fails(503, retry_after_ms="1")(asked)

    with serving(busy) as server, kind(server.url) as client:
        (result,) = client.ask_many([Question(path, "?")])
    assert isinstance(result, InvalidImage)


@BOTH
def test_busy_servers_are_asked_again(kind: Any) -> None:
    """Each question has its own retries."""
    seen: dict[str, int] = {}

    def every_other(asked: Asked) -> None:
        seen[asked.question] = seen.get(asked.question, 0) + 1
        (echoes if seen[asked.question] == 2 else fails(429, retry_after_ms="1"))(asked)

    with serving(every_other) as server, kind(server.url) as client:
        assert texts(client.ask_many(questions(10))) == [str(number) for number in range(10)]
    assert set(seen.values()) == {2}


@BOTH
def test_a_question_has_its_own_deadline(kind: Any) -> None:
    """A question's timeout is its own, and counts from when it is worked on."""

    def silent(asked: Asked) -> None:
        (keeps_silent if asked.question == "silent" else echoes)(asked)

    asked = [Question(b"x", "silent", timeout=0.3), Question(b"x", "silent", timeout=0.3), Question(b"x", "a")]
    with serving(silent) as server, kind(server.url) as client:
        assert texts(client.ask_many(asked, concurrency=1)) == ["TimedOut", "TimedOut", "a"]


@BOTH
def test_what_was_taken_is_answered_before_the_source_fails(kind: Any) -> None:
    """An exception of the iterable comes after the answers to the questions that it has given."""

    def breaks() -> Iterator[Question]:
        yield from questions(3)
        raise LookupError

    with serving(echoes) as server, kind(server.url) as client:
        results = client.ask_many(breaks())
        assert texts(next(results) for _ in range(3)) == ["0", "1", "2"]
        with pytest.raises(LookupError):
            next(results)


@BOTH
def test_closing_early_ends_what_is_under_way(kind: Any) -> None:
    """Closing the generator closes the connections of the questions that are worked on, and asks no more; other calls go on."""

    def first_only(asked: Asked) -> None:
        if asked.question == "0":
            asked.wait(lambda: asked.server.in_flight == 4)
        (echoes if asked.question in ("0", "alone") else keeps_silent)(asked)

    with serving(first_only) as server, kind(server.url, timeout=600) as client:
        client.ask(b"x", "alone")
        results = client.ask_many(questions(100), concurrency=4)
        assert next(results).text == "0"
        results.close()
        with server.lock:
            assert server.lock.wait_for(lambda: server.in_flight == 0, 30)
        # A fourth may have taken the place of "0", and may have been cut off before it had arrived as a whole.
        assert server.left in (3, 4)
        assert len(server.requests) - 2 in (3, 4)
        assert client.ask(b"x", "alone").text == "alone"


@BOTH
def test_closing_early_ends_pauses(kind: Any) -> None:
    """A question that waits to be asked again is not waited for."""
    with serving(echoes, fails(503, retry_after="100")) as server, kind(server.url, timeout=600) as client:
        results = client.ask_many(questions(9), concurrency=1)
        assert next(results).text == "0"
        with server.lock:
            assert server.lock.wait_for(lambda: len(server.requests) == 2 and not server.in_flight, 30)
        closing = threading.Thread(target=results.close)
        closing.start()
        closing.join(30)
        assert not closing.is_alive()
    assert len(server.requests) == 2


def test_no_thread_outlives_a_batch() -> None:
    """When the generator is closed, or merely forgotten, its threads have ended."""

    def threads() -> list[str]:
        return [thread.name for thread in threading.enumerate() if thread.name.startswith("ergo-client")]

    with serving(echoes) as server, Client(server.url) as client:
        results = client.ask_many(questions(20))
        next(results)
        assert threads()
        results.close()
        assert not threads()
        for _ in client.ask_many(questions(20)):
            break
        gc.collect()
        assert not threads()


@BOTH
@pytest.mark.parametrize("concurrency", [0, -1])
def test_a_batch_of_no_workers_is_refused(kind: Any, concurrency: int) -> None:
    """A concurrency below 1 is refused, not waited for."""
    with kind("http://127.0.0.1:1") as client, pytest.raises(ValueError, match="concurrency"):
        list(client.ask_many([], concurrency=concurrency))


@BOTH
def test_no_questions(kind: Any) -> None:
    """No questions have no answers."""
    with kind("http://127.0.0.1:1") as client:
        assert list(client.ask_many([])) == []


@BOTH
def test_questions_may_share_an_image(kind: Any) -> None:
    """Questions that name the same open file, or the same Pillow image, each send the whole of it."""
    data = bytes(range(256)) * 4096
    file = io.BytesIO(data)
    opened = Image.open(io.BytesIO(picture(900, 700)))
    images: list[Any] = 10 * [file, opened]
    asked = [Question(image, str(number)) for number, image in enumerate(images)]
    with serving(echoes) as server, kind(server.url) as client:
        assert texts(client.ask_many(asked, concurrency=8)) == [str(number) for number in range(20)]
    files, pixels = ({request.file for request in server.requests if int(request.question) % 2 == odd} for odd in (0, 1))
    assert files == {data}
    assert len(pixels) == 1


@BOTH
def test_answers_of_a_batch_keep_paths_only(tmp_path: Path, kind: Any) -> None:
    """An answer of a batch can be drawn on the file it was asked about, and does not keep bytes or pixels."""
    path = tmp_path / "picture.png"
    path.write_bytes(picture())
    with serving(gives()) as server, kind(server.url) as client:
        by_path, *others = client.ask_many([Question(path, "?"), Question(picture(), "?"), Question(Image.open(path), "?")])
    assert by_path.draw().size == (800, 600)
    for answer in others:
        with pytest.raises(ValueError, match="draw needs the image"):
            answer.draw()
        assert answer.draw(path).size == (800, 600)


def test_answers_are_yielded_while_the_next_question_is_waited_for() -> None:
    """With an asynchronous source, an answer may be what the next question depends on."""

    async def run(url: str) -> list[str]:
        found: list[str] = []
        answered = asyncio.Event()

        async def one_after_the_other() -> AsyncIterator[Question]:
            for number in range(3):
                yield Question(b"x", str(number))
                await answered.wait()
                answered.clear()

        async with AsyncClient(url) as client:
            async for result in client.ask_many(one_after_the_other()):
                assert isinstance(result, Answer)
                found.append(result.text)
                answered.set()
        return found

    with serving(echoes) as server:
        assert asyncio.run(run(server.url)) == ["0", "1", "2"]


def test_cancelling_who_reads_ends_the_batch() -> None:
    """A task that is cancelled while it waits for an answer takes its batch with it."""

    async def read(url: str) -> None:
        async with (
            AsyncClient(url, timeout=600) as client,
            contextlib.aclosing(client.ask_many(questions(100), concurrency=4)) as results,
        ):
            async for _ in results:
                pass

    async def run(url: str) -> None:
        task = asyncio.create_task(read(url))
        await asyncio.to_thread(in_flight)
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()
        assert asyncio.all_tasks() == {asyncio.current_task()}

    with serving(keeps_silent) as server:

        def in_flight() -> None:
            with server.lock:
                assert server.lock.wait_for(lambda: server.in_flight == 4, 30)

        asyncio.run(run(server.url))
        with server.lock:
            assert server.lock.wait_for(lambda: server.left == 4, 30)
        assert len(server.requests) == 4


def test_results_are_told_apart_by_their_type() -> None:
    """A result is an answer or an error, and nothing else."""
    with serving(echoes) as server, Client(server.url) as client:
        for result in client.ask_many([*questions(2), Question("missing", "?")]):
            assert isinstance(result, Answer) != isinstance(result, ClientError)


def test_closing_the_client_ends_a_batch() -> None:
    """Who waits for the answers of a batch gets an error when another thread closes the client."""
    ended: list[BaseException] = []
    with serving(keeps_silent) as server:
        client = Client(server.url, timeout=600)

        def read() -> None:
            try:
                for result in client.ask_many(questions(8), concurrency=2):
                    assert isinstance(result, ClientError)
            except RuntimeError as error:
                ended.append(error)

        reader = threading.Thread(target=read)
        reader.start()
        with server.lock:
            assert server.lock.wait_for(lambda: server.in_flight == 2, 30)
        client.close()
        reader.join(30)
        assert not reader.is_alive()
    assert [type(error).__mro__[1] for error in ended] == [RuntimeError]
