"""A running generation as its front reads it: pieces of all choices, in order of arrival.

A plain iterator object rather than an async generator: closing it stops the engine's work even if
it was never read, and costs no extra frame per token. Reading takes everything that has arrived
since the last read and makes one piece per choice of it, so a slow client gets fewer, larger ones.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import AsyncIterator

from cluster.base.errors import PenstockError, error_from_dict
from replicas.api import FinishReason, GenerationDelta, GenerationRequest
from router.api import Piece, Usage
from router.choice_stream import ChoiceStream
from router.fault_boundary import fault_boundary
from router.request_channel import RequestChannel
from router.running_requests import RunningRequest
from router.sampling_fields import TextOptions
from router.served_model import ServedModel


class GenerationStream(AsyncIterator[Piece]):
    """Pieces of one generation; ends the running request when it ends, fails or is closed."""

    def __init__(
        self,
        running: RunningRequest,
        channel: RequestChannel,
        request: GenerationRequest,
        model: ServedModel,
        options: TextOptions,
    ) -> None:
        self._running = running
        self._channel = channel
        self._request = request
        self._choices = [
            ChoiceStream(index, model.tokenizer, request.prompt_token_ids, options)
            for index in range(request.params.n)
        ]
        self._num_open = len(self._choices)
        self._ready: deque[Piece] = deque()
        self._failure: PenstockError | None = None
        self._started = False

    def echo(self, prompt_text: str) -> None:
        """Begin every choice with the prompt."""
        self._ready.extend(Piece(index=choice.index, text=prompt_text) for choice in self._choices)

    async def __anext__(self) -> Piece:
        try:
            while not self._ready:
                if self._failure is not None:
                    raise self._failure
                if not self._num_open:
                    raise StopAsyncIteration
                deltas = await self._channel.receive()
                with fault_boundary(self._running.request_id):
                    self._absorb(deltas)
            return self._ready.popleft()
        except BaseException:
            self._running.end()
            raise

    async def aclose(self) -> None:
        """Stop the engine's work and give the request's place back."""
        self._num_open = 0
        self._ready.clear()
        self._running.end()

    def _absorb(self, deltas: list[GenerationDelta]) -> None:
        if not self._started:
            self._started = True
            self._running.set_waiting_tokens(0)
        touched: dict[int, ChoiceStream] = {}
        for delta in deltas:
            if delta.finish_reason is FinishReason.ERROR:
                self._failure = error_from_dict(delta.error or {})
                break
            choice = self._choices[delta.index]
            if choice.finish_reason is not None:
                continue
            touched[delta.index] = choice
            if choice.push(delta):
                self._channel.cancel_choice(delta.index)
            if choice.finish_reason is not None:
                self._num_open -= 1
        pieces = [piece for choice in touched.values() if (piece := choice.take()) is not None]
        if not self._num_open and self._failure is None and pieces:
            pieces[-1] = dataclasses.replace(pieces[-1], usage=self._usage())
        self._ready.extend(pieces)

    def _usage(self) -> Usage:
        return Usage(
            prompt_tokens=len(self._request.prompt_token_ids),
            completion_tokens=sum(len(choice.token_log) for choice in self._choices),
            cached_tokens=max(choice.num_cached_tokens for choice in self._choices),
        )
