"""One generation after the other, in the order in which they were asked for."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from threading import Condition, Event, Thread
from typing import Any

from polyquant.loaded import LoadedModel
from polyquant.models.tokens import Token
from polyquant.serving.refusals import Refused


@dataclass(eq=False)
class Job:
    """One generation: what is asked for, and, in the event loop that asks, where its tokens come."""

    ids: Sequence[int]  # of the prompt
    parameters: Mapping[str, Any]  # of `generate`
    seed: int
    top: int | None
    come: asyncio.Queue[Token | BaseException | None] = field(default_factory=asyncio.Queue)
    stopped: Event = field(default_factory=Event)
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)

    def give(self, what: Token | BaseException | None) -> None:
        """From the thread that generates. None: the end."""
        with suppress(RuntimeError):  # the loop is closed: nobody waits for it
            self.loop.call_soon_threadsafe(self.come.put_nowait, what)

    async def tokens(self) -> AsyncIterator[Token]:
        """As they come. Raises what the generation raised."""
        while (what := await self.come.get()) is not None:
            if isinstance(what, BaseException):
                raise what
            yield what


class Line:
    """The jobs that wait for a model, and the thread that does them."""

    def __init__(self, loaded: LoadedModel, waiting: int) -> None:
        """waiting: jobs that may wait while another is done."""
        self._loaded, self._most = loaded, waiting
        self._jobs, self._changed = deque[Job](), Condition()
        self._running: Job | None = None
        self._closed = False
        self._thread = Thread(target=self._work, name="polyquant-generation", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """How many jobs wait."""
        return len(self._jobs)

    @property
    def running(self) -> int:
        """1 while a job is done, else 0."""
        return int(self._running is not None)

    def enter(self, job: Job) -> None:
        """Put a job at the end. Raises Refused where too many wait, or no more are taken."""
        with self._changed:
            if self._closed:
                raise Refused(503, "the server is ending", code="shutting_down")
            if len(self._jobs) >= self._most + (self._running is None):
                raise Refused(429, f"{self._most} requests wait already: come again in some seconds", code="queue_full")
            self._jobs.append(job)
            self._changed.notify()

    def leave(self, job: Job) -> None:
        """End a job, whether it waits or is being done; one that is over already stays as it is."""
        job.stopped.set()
        with self._changed, suppress(ValueError):
            self._jobs.remove(job)

    def close(self) -> None:
        """Take no more jobs, and end those that there are: they get an error."""
        with self._changed:
            self._closed = True
            ended = [*self._jobs, *([self._running] if self._running is not None else [])]
            self._jobs.clear()
            self._changed.notify()
        for job in ended:
            job.stopped.set()
            job.give(Refused(503, "the server is ending", code="shutting_down"))

    def join(self, seconds: float) -> bool:
        """Whether the thread has ended within so many seconds."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._running = None
                while not self._jobs and not self._closed:
                    self._changed.wait()
                if self._closed:
                    return
                job = self._running = self._jobs.popleft()
            self._do(job)
            del job  # kept by nobody until the next

    def _do(self, job: Job) -> None:
        try:
            made = self._loaded.tokens(job.ids, seed=job.seed, top=job.top, **job.parameters)
            with closing(made):
                for token in made:
                    if job.stopped.is_set():
                        return
                    job.give(token)
        except BaseException as error:
            job.give(error)
        else:
            job.give(None)
