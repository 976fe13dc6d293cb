"""The pieces of all prompts of one body as one iterator, with choices numbered through.

One prompt (the usual case) passes straight through. Several are read by one task each into a
bounded queue, so that a client that reads slowly slows them down instead of filling memory.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Sequence

from router.api import Generation, Handler, Piece, PieceStream, Usage
from router.http.generation_body import GenerationJob
from router.tier_fields import tier_fields

_QUEUE_PIECES = 64


class PieceSource:
    """Iterator over the pieces of started generations; `aclose` stops all of them.

    `usage` is complete when the iteration has ended.
    """

    def __init__(self, generations: Sequence[Generation], choices_per_input: int) -> None:
        self.first = generations[0]
        self.num_choices = len(generations) * choices_per_input
        self.usage = Usage()
        self._generations = generations
        self._stride = choices_per_input
        self._queue: asyncio.Queue[Piece | Exception | None] = asyncio.Queue(_QUEUE_PIECES)
        self._tasks: list[asyncio.Task[None]] = []
        self._num_running = len(generations)

    @property
    def tier(self) -> dict[str, str]:
        """Where the pieces come from, as headers; several prompts may be in several places."""
        headers: dict[str, list[str]] = {}
        for generation in self._generations:
            for name, value in tier_fields(generation.tier):
                known = headers.setdefault(f"x-penstock-{name}", [])
                if value not in known:
                    known.append(value)
        return {name: ", ".join(values) for name, values in headers.items()}

    def __aiter__(self) -> PieceSource:
        return self

    async def __anext__(self) -> Piece:
        piece = await (self._next_of_many() if len(self._generations) > 1 else self._next_of_one())
        if piece.usage is not None:
            self.usage = _sum(self.usage, piece.usage)
        return piece

    async def aclose(self) -> None:
        """Stop reading, and the engine's work with it."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for generation in self._generations:
            await generation.pieces.aclose()

    async def _next_of_one(self) -> Piece:
        return await self.first.pieces.__anext__()

    async def _next_of_many(self) -> Piece:
        if not self._tasks:
            self._tasks = [
                asyncio.create_task(self._pump(generation.pieces, at * self._stride))
                for at, generation in enumerate(self._generations)
            ]
        while self._num_running:
            item = await self._queue.get()
            if isinstance(item, Exception):
                raise item
            if item is not None:
                return item
            self._num_running -= 1
        raise StopAsyncIteration

    async def _pump(self, pieces: PieceStream, first_index: int) -> None:
        try:
            async for piece in pieces:
                await self._queue.put(dataclasses.replace(piece, index=first_index + piece.index))
            await self._queue.put(None)
        except Exception as error:  # handed to the reader, who answers it
            await self._queue.put(error)


async def start_generations(handler: Handler, job: GenerationJob) -> PieceSource:
    """Start every prompt of a body; if one is refused, none goes on.

    Raises:
        PenstockError: what the handler refuses.
    """
    started: list[Generation] = []
    try:
        for request in job.inputs:
            started.append(await handler.generate(request))  # noqa: PERF401 - kept for the undo
    except BaseException:
        for generation in started:
            await generation.pieces.aclose()
        raise
    return PieceSource(started, job.choices_per_input)


def _sum(left: Usage, right: Usage) -> Usage:
    return Usage(
        prompt_tokens=left.prompt_tokens + right.prompt_tokens,
        completion_tokens=left.completion_tokens + right.completion_tokens,
        cached_tokens=left.cached_tokens + right.cached_tokens,
    )
