"""Who asks, how often and for how long: Locust's users and shapes. Import `locust` before this, as it replaces the sockets."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import random
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeVar, cast

import gevent
from gevent.event import Event
from hostile import IMAGES
from locust import LoadTestShape, User, constant, task
from locust.env import Environment
from locust.exception import StopUser

from loadtests import arrivals
from loadtests.pictures import Picture
from loadtests.questions import (
    LEFT,
    PATIENCE,
    Line,
    Reply,
    Request,
    Sample,
    Server,
    about_image,
    about_upload,
    ask,
    chat,
    forget,
    upload,
)
from loadtests.report import Run

T = TypeVar("T")

BROKEN = ("jpeg: cut off", "png: cut off", "svg: entities", "arbitrary", "nothing", "heic", "png: 0 x 0")
BOMBS = (
    "png: 30,000 x 30,000, 1 bit",
    "png: 60 texts of 1 MB",
    "jpeg: 127 progressive scans",
    "jpeg: 3,000 sequential scans",
    "png: header alone, of 2**31 - 1 squared",
)
"""Of the tests' table: one of each way to do harm that is small to send."""

HOSTILE_PAUSE = 0.2
"""Seconds between two requests of one hostile user: five a second of each sort, many times what a good user sends."""

SLOW_SECONDS = 20.0
"""A slow sender gives up after that; the server's default cuts it off after 15."""

NEIGHBOUR_PAUSE = 1.0
"""Seconds between two turns of somebody who uses another part of the interface. Two users ask without any pause beside; these
need only come often enough that what they leave behind shows."""

SILENCE = 7.0
"""Longest pause on a connection that is kept: above the 5 seconds after which the server's default closes it, so that either side
closes some."""

AFTERWARDS = 6
"""Answers to questions after a spike without which it has not ended: two users first wait for what the spike has left, and of
fewer the median would be one of these."""

RECOVERY_SECONDS = 60.0
"""After which it has ended all the same."""

WORD = "abcdefghijklmnopqrstuvwxyz0123456789"
"""Letters of made-up names, all of which may stand in a URL and in a header."""

METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "HEAD")

OVERSIZED = 10 * 1024**3
"""Bytes that are announced; the server's default takes 128 MiB."""


class Load(Environment):
    """Locust's environment for one run.

    Args:
        server: what is under load.
        requests: what the users take in turn; when none is left, the run ends.
        users: the classes of users.
        shape: how their number changes; None: it stays.
        schedule: when each request is due, for an open loop.
        pictures: what users who ask in several ways take in turn.
    """

    def __init__(
        self,
        server: Server,
        requests: Iterator[Request],
        users: Sequence[type[User]],
        *,
        shape: LoadTestShape | None = None,
        schedule: arrivals.Schedule = (),
        pictures: Iterable[Picture] = (),
    ) -> None:
        super().__init__(user_classes=list(users), shape_class=shape, stop_timeout=PATIENCE, catch_exceptions=False)
        self.server = server
        self.requests = requests
        self.schedule = schedule
        self.pictures = iter(pictures)
        self.samples: list[Sample] = []
        self.cpu = server.cpu()
        self.zero = time.perf_counter()
        self.over = Event()
        self.events.request.add_listener(self._hear)

    def take(self) -> Request:
        """Return the next request.

        Raises:
            StopUser: there is none left.
        """
        return self._next(self.requests)

    def picture(self) -> Picture:
        """Return the next picture.

        Raises:
            StopUser: there is none left.
        """
        return self._next(self.pictures)

    def _next(self, left: Iterator[T]) -> T:
        for one in left:
            return one
        self.over.set()
        raise StopUser

    def hold(self, name: str, users: int, seconds: float) -> Run:
        """Let so many users ask for so long, or until no request is left; those under way are finished."""
        runner = self.create_local_runner()
        self.zero = time.perf_counter()
        runner.start(users, spawn_rate=users)
        self.over.wait(seconds)
        self.over.set()
        runner.quit()
        return self._run(name)

    def follow(self, name: str) -> Run:
        """Let the shape decide how many users ask, until it ends."""
        runner = self.create_local_runner()
        self.zero = time.perf_counter()
        runner.start_shape()
        while runner.shape_greenlet is not None and not runner.shape_greenlet.dead and not self.over.is_set():
            gevent.sleep(0.1)
        self.over.set()
        runner.quit()
        return self._run(name)

    def _run(self, name: str) -> Run:
        # What one reading of /metrics takes is in it, some ten milliseconds in all.
        return Run(name, sorted(self.samples, key=lambda sample: sample.sent), self.server.cpu() - self.cpu)

    def _hear(self, context: dict[str, Any], **_: Any) -> None:
        self.samples.append(context["sample"])


# --- users ----------------------------------------------------------------------------------------------------------------


class Visitor(User):
    """Somebody who asks, whatever it is."""

    abstract = True

    @property
    def load(self) -> Load:
        """The run."""
        return cast(Load, self.environment)

    def ask(self, request: Request, due: float | None = None, line: Line | None = None) -> Reply:
        """Send a request and report what became of it; ``due`` and ``line`` as `questions.ask` has them."""
        sample = ask(self.load.server, request, self.load.zero, due, line)
        self.report(sample)
        return sample.reply

    def report(self, sample: Sample) -> None:
        """Tell Locust of a request."""
        self.load.events.request.fire(
            request_type="POST",
            name=sample.kind,
            response_time=1000 * sample.seconds,
            response_length=len(sample.reply.text),
            exception=None if sample.answered else RuntimeError(sample.reply.code),
            context={"sample": sample},
        )


class Asker(Visitor):
    """Closed loop: asks, waits for the answer, asks again. Who is refused comes back when told to."""

    @task
    def question(self) -> None:
        """Ask the next."""
        reply = self.ask(self.load.take())
        if reply.retry_after:
            self.load.over.wait(reply.retry_after)


class Crowd(Visitor):
    """Open loop: all who come, each when due."""

    fixed_count = 1

    @task
    def all(self) -> None:
        """Send every request of the schedule."""
        load = self.load
        load.zero = time.perf_counter()
        arrivals.keep(load.schedule, load.zero, [functools.partial(self.ask, request) for request in load.requests])
        load.over.set()
        raise StopUser


class Student(Visitor):
    """Uploads an image once, and asks all of its questions, one after the other."""

    @task
    def image(self) -> None:
        """Take the next image."""
        picture = self.load.picture()
        kept = self.ask(upload(picture))
        if kept.status == 201:
            for number, (question, answer) in enumerate(picture.asked):
                self.ask(about_upload(kept.text, question, answer, "again" if number else "first"))


class Neighbour(Visitor):
    """Somebody who uses the interface in another way than the askers; each way is one user."""

    abstract = True
    fixed_count = 1
    wait_time = constant(NEIGHBOUR_PAUSE)

    @task
    def turn(self) -> None:
        """Do it once."""
        self.use(self.load.picture())

    def use(self, picture: Picture) -> None:
        """Ask about a picture."""
        raise NotImplementedError


class Watcher(Neighbour):
    """Has the answer as events."""

    def use(self, picture: Picture) -> None:
        """Ask about a picture."""
        self.ask(about_image(picture, "streamed", stream=True))


class Chatter(Neighbour):
    """Speaks OpenAI's protocol: once whole, once as events."""

    def use(self, picture: Picture) -> None:
        """Ask about a picture, both ways."""
        self.ask(chat(picture, "ergo", kind="chat"))
        self.ask(chat(picture, "ergo", kind="chat, streamed", stream=True))


class Tidy(Neighbour):
    """Uploads an image, asks about it, and has it forgotten."""

    def use(self, picture: Picture) -> None:
        """Do all three."""
        kept = self.ask(upload(picture))
        if kept.status == 201:
            self.ask(about_upload(kept.text, *picture.asked[0], "of an upload"))
            self.ask(forget(kept.text))


class Regular(Neighbour):
    """Keeps a connection, asks several times on it, says nothing for a while, and asks again."""

    def on_start(self) -> None:
        """Begin with a connection."""
        self.line, self.draw = Line(self.load.server), random.Random(1)

    def use(self, picture: Picture) -> None:
        """Ask twice, and be silent: at times for longer than the server waits."""
        for question, answer in picture.asked[:2]:
            self.ask(about_image(replace(picture, asked=((question, answer),)), "on a kept connection"), line=self.line)
        if self.draw.random() < 0.2:
            self.line.close()
        self.load.over.wait(self.draw.uniform(0, SILENCE))

    def on_stop(self) -> None:
        """Close the connection."""
        self.line.close()


NEIGHBOURS: tuple[type[Neighbour], ...] = (Watcher, Chatter, Tidy, Regular)


class Hostile(Visitor):
    """Somebody who does harm; each sort is one user."""

    abstract = True
    fixed_count = 1
    wait_time = constant(HOSTILE_PAUSE)
    kind = ""
    images: tuple[str, ...] = ()

    def on_start(self) -> None:
        """Begin with the first image."""
        self.turn = itertools.cycle(self.images)

    @task
    def strike(self) -> None:
        """Do it once."""
        self.harm()

    def harm(self) -> None:
        """Send the next image of the table."""
        self.ask(Request("/v1/vqa?question=x", harmful(next(self.turn)), self.kind, content_type="image/jpeg"))

    def bare(self, use: Callable[[socket.socket], Reply]) -> None:
        """Use a connection by hand."""
        since = time.perf_counter()
        connection = self.load.server.connect()
        try:
            connection.connect()
            reply = use(connection.sock)
        except OSError as error:
            reply = Reply(0, type(error).__name__)
        finally:
            connection.close()
        sent = since - self.load.zero
        self.report(Sample(self.kind, sent, sent, time.perf_counter() - self.load.zero, reply, None))


class Broken(Hostile):
    """Sends what is no image, or only a part of one."""

    kind, images = "broken image", BROKEN


class Bomb(Hostile):
    """Sends small files that are dear to open."""

    kind, images = "bomb", BOMBS


class Oversized(Hostile):
    """Announces a body that no limit allows."""

    kind = "oversized body"

    def harm(self) -> None:
        """Send the head, and the beginning."""
        head = self.load.server.head("/v1/vqa?question=x", content_type="image/jpeg", content_length=str(OVERSIZED))

        def use(sock: socket.socket) -> Reply:
            sock.sendall(head + bytes(1000))
            return answer_on(sock)

        self.bare(use)


class SlowSender(Hostile):
    """Sends a byte every half second."""

    kind = "slow sender"

    def harm(self) -> None:
        """Drip until the server has had enough, or the run is over."""
        head = self.load.server.head("/v1/vqa?question=x", content_type="image/jpeg", content_length="100000")

        def use(sock: socket.socket) -> Reply:
            sock.sendall(head)
            sock.settimeout(0.5)
            end = time.perf_counter() + SLOW_SECONDS
            while time.perf_counter() < end and not self.load.over.is_set():
                with contextlib.suppress(TimeoutError):
                    return answer_on(sock)
                sock.sendall(b"x")
            return Reply(0, LEFT)

        self.bare(use)


class Stranger(Hostile):
    """Uses another name for everything each time: paths, methods, models, keys, request ids, fields. A server that remembers any,
    in a label or in a table, grows."""

    kind = "stranger"

    def on_start(self) -> None:
        """Begin with a connection."""
        self.line, self.draw = Line(self.load.server), random.Random(2)

    def harm(self) -> None:
        """Ask for something that is not there."""
        self.ask(self.anything(), line=self.line)

    def on_stop(self) -> None:
        """Close the connection."""
        self.line.close()

    def anything(self) -> Request:
        """Return the next request."""
        word = self.word
        paths = (f"/{word()}", f"/v1/{word()}/{word()}", f"/v1/models/{word()}", f"/v1/images/img_{word()}", "/v1/models")
        asking = (
            f"/v1/vqa?question={word()}&model={word()}&{word()}={word()}",
            f"/v1/vqa/estimate?{word()}={word()}",
            "/v1/vqa",
            "/v1/chat/completions",
        )
        asks = self.draw.random() < 0.5
        method = "POST" if asks else self.draw.choice((*METHODS, word().upper()))
        path = self.draw.choice(asking if asks else paths)
        said = {"role": "user", "content": word()}
        body = json.dumps({"model": word(), "messages": [said], "question": word(), "image": f"img_{word()}", word(): word()})
        headers = {"x-request-id": word(), "user-agent": word(), f"x-{word()}": word()}
        if self.draw.random() < 0.5:  # else it is the load's own key, which gets further
            headers["authorization"] = f"Bearer {word()}"
        return Request(path, body.encode() if method == "POST" else b"", self.kind, method=method, headers=headers)

    def word(self) -> str:
        """Return a name that was not used before, but for chance."""
        return "".join(self.draw.choices(WORD, k=12))


class Leaver(Hostile):
    """Asks a good question, now whole, now as events, and is gone before the answer."""

    kind = "leaver"

    def on_start(self) -> None:
        """Begin with a whole answer."""
        self.more = itertools.cycle(("", "&stream=true"))

    def harm(self) -> None:
        """Ask, wait for the zoom turn to begin, leave."""
        request = self.load.take()
        length = str(len(request.body))
        path = request.path + next(self.more)
        head = self.load.server.head(path, content_type=request.content_type, content_length=length)

        def use(sock: socket.socket) -> Reply:
            sock.sendall(head + request.body)
            gevent.sleep(0.1)
            return Reply(0, LEFT)

        self.bare(use)


HOSTILE: tuple[type[Hostile], ...] = (Broken, Bomb, Oversized, SlowSender, Leaver)


@functools.cache
def harmful(name: str) -> bytes:
    """Return an image of the tests' table."""
    return IMAGES[name]()


def answer_on(sock: socket.socket) -> Reply:
    """Read the status of an answer from a connection; 0 where it was just closed.

    Raises:
        TimeoutError: nothing was said yet.
    """
    line = sock.recv(4096).partition(b"\r\n")[0].split()
    return Reply(int(line[1]), "refused") if len(line) > 1 else Reply(0, "cut off")


class Spike(LoadTestShape):
    """As many users as usual, then many more, then as many as usual, until it can be told whether all is as before.

    Args:
        usual: users in the first and last third.
        peak: users between.
        seconds: of each third.
    """

    def __init__(self, usual: int, peak: int, seconds: float) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.usual, self.peak, self.seconds = usual, peak, seconds

    def tick(self) -> tuple[int, float] | None:
        """Say how many there are now, and how many come or go in a second."""
        at: float = self.get_run_time()  # type: ignore[no-untyped-call]
        third = int(at // self.seconds)
        enough = at > 3 * self.seconds + RECOVERY_SECONDS or self.afterwards() >= AFTERWARDS
        return (self.peak if third == 1 else self.usual, self.peak) if third < 3 or not enough else None

    def afterwards(self) -> int:
        """Return how many questions were asked after the spike and answered."""
        samples = cast(Load, self.runner.environment).samples if self.runner else []
        return sum(sample.answered and self.phase(sample) == "after" for sample in samples)

    def phase(self, sample: Sample) -> str:
        """Say when a question was asked."""
        return ("before", "spike", "after")[min(2, int(sample.sent / self.seconds))]


# --- runs -----------------------------------------------------------------------------------------------------------------


def closed(name: str, server: Server, requests: Sequence[Request], users: int, seconds: float) -> Run:
    """Run a closed loop of so many users, until the time is over or each request was sent once."""
    return Load(server, iter(requests), [Asker]).hold(name, users, seconds)


def open_loop(name: str, server: Server, requests: Sequence[Request], schedule: arrivals.Schedule) -> Run:
    """Send each request when the schedule says, whatever became of those before."""
    load = Load(server, iter(requests), [Crowd], schedule=schedule)
    # The schedule ends by itself; a day is for what goes wrong.
    return load.hold(name, 1, 86_400)


def repeat(name: str, server: Server, pictures: Sequence[Picture], users: int, seconds: float) -> Run:
    """Ask all questions about each image, which is uploaded once."""
    return Load(server, iter(()), [Student], pictures=pictures).hold(name, users, seconds)


def hostile(name: str, server: Server, requests: Sequence[Request], users: int, seconds: float) -> Run:
    """Let good users ask while each sort of harm is done beside them."""
    for image in (*BROKEN, *BOMBS):
        harmful(image)  # made before the clock runs
    load = Load(server, itertools.cycle(requests), [Asker, *HOSTILE])
    return load.hold(name, users + len(HOSTILE), seconds)


def spike(name: str, server: Server, requests: Sequence[Request], usual: int, peak: int, seconds: float) -> Run:
    """Run a spike in the middle third of ``seconds``; what was sent in each third is told apart.

    The requests come again when all were sent: how many are refused, and cost nothing, is not known before.
    """
    shape = Spike(usual, peak, seconds / 3)
    run = Load(server, itertools.cycle(requests), [Asker], shape=shape).follow(name)
    return replace(run, samples=[replace(sample, kind=shape.phase(sample)) for sample in run.samples])


def soak(name: str, server: Server, pictures: Sequence[Picture], users: int, seconds: float) -> Run:
    """Ask over and over in every way there is, with broken images, bodies too large, strangers and people who leave beside."""
    beside: tuple[type[User], ...] = (*NEIGHBOURS, Broken, Oversized, Stranger, Leaver)
    load = Load(server, itertools.cycle(asked(pictures)), [Asker, *beside], pictures=itertools.cycle(pictures))
    return load.hold(name, users + len(beside), seconds)


def asked(pictures: Sequence[Picture], kind: str | None = "question", budget: int | None = None) -> list[Request]:
    """Return the requests that ask /v1/vqa the first question about each picture.

    Args:
        pictures: what about.
        kind: what they are counted under; None: the kind of image.
        budget: visual tokens of a view; None: the model's own.
    """
    return [about_image(picture, kind or picture.name, budget=budget) for picture in pictures]
