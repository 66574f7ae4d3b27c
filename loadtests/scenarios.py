"""Who asks, how often and for how long: Locust's users and shapes. Import `locust` before this, as it replaces the sockets."""

from __future__ import annotations

import contextlib
import functools
import itertools
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, cast

import gevent
from gevent.event import Event
from hostile import IMAGES
from locust import LoadTestShape, User, constant, task
from locust.env import Environment
from locust.exception import StopUser

from loadtests import arrivals
from loadtests.pictures import Picture
from loadtests.questions import PATIENCE, Reply, Request, Sample, Server, about_image, about_upload, ask
from loadtests.report import Run

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
    """

    def __init__(
        self,
        server: Server,
        requests: Iterator[Request],
        users: Sequence[type[User]],
        *,
        shape: LoadTestShape | None = None,
        schedule: arrivals.Schedule = (),
        pictures: Sequence[Picture] = (),
    ) -> None:
        super().__init__(user_classes=list(users), shape_class=shape, stop_timeout=PATIENCE, catch_exceptions=False)
        self.server = server
        self.requests = requests
        self.schedule = schedule
        self.pictures = iter(pictures)
        self.samples: list[Sample] = []
        self.zero = time.perf_counter()
        self.over = Event()
        self.events.request.add_listener(self._hear)

    def take(self) -> Request:
        """Return the next request.

        Raises:
            StopUser: there is none left.
        """
        if (request := next(self.requests, None)) is None:
            self.over.set()
            raise StopUser
        return request

    def hold(self, users: int, seconds: float) -> list[Sample]:
        """Let so many users ask for so long, or until no request is left; those under way are finished."""
        runner = self.create_local_runner()
        self.zero = time.perf_counter()
        runner.start(users, spawn_rate=users)
        self.over.wait(seconds)
        self.over.set()
        runner.quit()
        return self.samples

    def follow(self) -> list[Sample]:
        """Let the shape decide how many users ask, until it ends."""
        runner = self.create_local_runner()
        self.zero = time.perf_counter()
        runner.start_shape()
        while runner.shape_greenlet is not None and not runner.shape_greenlet.dead and not self.over.is_set():
            gevent.sleep(0.1)
        self.over.set()
        runner.quit()
        return self.samples

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

    def ask(self, request: Request, due: float | None = None) -> None:
        """Send a request and report what became of it; ``due`` as `questions.ask` has it."""
        self.report(ask(self.load.server, request, self.load.zero, due))

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
    """Closed loop: asks, waits for the answer, asks again."""

    @task
    def question(self) -> None:
        """Ask the next."""
        self.ask(self.load.take())


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
        load = self.load
        if (picture := next(load.pictures, None)) is None:
            load.over.set()
            raise StopUser
        status, said = load.server.post("/v1/images", picture.data, "image/jpeg")
        if status != 201:
            now = time.perf_counter() - load.zero
            self.report(Sample("upload", now, now, now, Reply(status, "upload_refused"), picture.answer))
            return
        for number, (question, answer) in enumerate(picture.asked):
            self.ask(about_upload(str(said["id"]), question, answer, "again" if number else "first"))


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
            return Reply(0, "left")

        self.bare(use)


class Leaver(Hostile):
    """Asks a good question, and is gone before the answer."""

    kind = "leaver"

    def harm(self) -> None:
        """Ask, wait for the zoom turn to begin, leave."""
        request = self.load.take()
        length = str(len(request.body))
        head = self.load.server.head(request.path, content_type=request.content_type, content_length=length)

        def use(sock: socket.socket) -> Reply:
            sock.sendall(head + request.body)
            gevent.sleep(0.1)
            return Reply(0, "left")

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
    """As many users as usual, then many more, then as many as usual.

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
        third = int(self.get_run_time() // self.seconds)  # type: ignore[no-untyped-call]
        return (self.peak if third == 1 else self.usual, self.peak) if third < 3 else None


# --- runs -----------------------------------------------------------------------------------------------------------------


def closed(name: str, server: Server, requests: Sequence[Request], users: int, seconds: float) -> Run:
    """Run a closed loop of so many users, until the time is over or each request was sent once."""
    return Run(name, Load(server, iter(requests), [Asker]).hold(users, seconds))


def open_loop(name: str, server: Server, requests: Sequence[Request], schedule: arrivals.Schedule) -> Run:
    """Send each request when the schedule says, whatever became of those before."""
    load = Load(server, iter(requests), [Crowd], schedule=schedule)
    # The schedule ends by itself; a day is for what goes wrong.
    return Run(name, load.hold(1, 86_400))


def repeat(name: str, server: Server, pictures: Sequence[Picture], users: int, seconds: float) -> Run:
    """Ask all questions about each image, which is uploaded once."""
    return Run(name, Load(server, iter(()), [Student], pictures=pictures).hold(users, seconds))


def hostile(name: str, server: Server, requests: Sequence[Request], users: int, seconds: float) -> Run:
    """Let good users ask while each sort of harm is done beside them."""
    for image in (*BROKEN, *BOMBS):
        harmful(image)  # made before the clock runs
    load = Load(server, itertools.cycle(requests), [Asker, *HOSTILE])
    return Run(name, load.hold(users + len(HOSTILE), seconds))


def spike(name: str, server: Server, requests: Sequence[Request], usual: int, peak: int, seconds: float) -> Run:
    """Run a spike in the middle third of ``seconds``; what was sent in each third is told apart."""
    load = Load(server, iter(requests), [Asker], shape=Spike(usual, peak, seconds / 3))
    phases = ("before", "spike", "after", "after")
    return Run(name, [replace(sample, kind=phases[int(3 * sample.sent / seconds)]) for sample in load.follow()])


def soak(name: str, server: Server, requests: Sequence[Request], users: int, seconds: float) -> Run:
    """Ask over and over, with broken images, bodies too large and people who leave beside."""
    load = Load(server, itertools.cycle(requests), [Asker, Broken, Oversized, Leaver])
    return Run(name, load.hold(users + 3, seconds))


def asked(pictures: Sequence[Picture], kind: str | None = "question") -> list[Request]:
    """Return the requests that ask /v1/vqa the first question about each picture; None counts them by the kind of image."""
    return [about_image(picture, kind or picture.name) for picture in pictures]
