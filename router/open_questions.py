"""Questions that a gateway has put to a replica and that are not answered yet; yes or no."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable


class OpenQuestions:
    """By number; everything runs on one loop."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        self._open: dict[int, asyncio.Future[bool]] = {}

    async def ask(self, send: Callable[[int], None], timeout_s: float) -> bool:
        """The answer to what `send(number)` asks; False when there is none in time."""
        number = next(self._numbers)
        answer: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._open[number] = answer
        try:
            send(number)
            async with asyncio.timeout(timeout_s):
                return await answer
        except TimeoutError:
            return False
        finally:
            del self._open[number]

    def answer(self, number: int, found: bool) -> None:
        """An answer has come; one that nobody waits for any more is ignored."""
        question = self._open.get(number)
        if question is not None and not question.done():
            question.set_result(found)

    def give_up(self) -> None:
        """There will be no answers: all are False."""
        for number in self._open:
            self.answer(number, found=False)
