"""A deterministic engine behind the real stream server: same thread model, no arithmetic."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from cluster.base.errors import PenstockError
from replicas.api import (
    FinishReason,
    GenerationDelta,
    GenerationRequest,
    ReplicaStats,
    TokenLogprob,
)

Publish = Callable[[Sequence[GenerationDelta], ReplicaStats], None]
Script = Callable[[GenerationRequest, int], Sequence[int]]


def repeat_prompt(request: GenerationRequest, index: int) -> Sequence[int]:
    """The prompt over and over, rotated by the choice's index."""
    ids = request.prompt_token_ids
    return [ids[(index + at) % len(ids)] for at in range(request.params.max_tokens)]


def logprob_of(token_id: int, num_top: int) -> TokenLogprob:
    top = tuple((token_id + at, -0.5 - at) for at in range(num_top))
    return TokenLogprob(token_id=token_id, logprob=-0.5, rank=1, top=top)


@dataclass
class _Running:
    request: GenerationRequest
    left: dict[int, list[int]]
    started: bool = False


@dataclass
class FakeEngine:
    """One token per choice and step; `aborts` records what was stopped."""

    step_s: float = 0.001
    script: Script = repeat_prompt
    refuse: PenstockError | None = None
    aborts: list[tuple[str, int | None]] = field(default_factory=list)
    requests: list[GenerationRequest] = field(default_factory=list)
    paused: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._running: dict[str, _Running] = {}
        self._stop = threading.Event()
        self._last_words: list[GenerationDelta] = []
        self._step = 0
        self._thread: threading.Thread | None = None

    def start(self, publish: Publish) -> None:
        self._thread = threading.Thread(target=self._loop, args=(publish,), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    @property
    def num_running(self) -> int:
        return len(self._running)

    def add_request(self, request: GenerationRequest) -> None:
        if self.refuse is not None:
            raise self.refuse
        with self._lock:
            self.requests.append(request)
            left = {}
            for choice in request.choices:
                script = list(self.script(request, choice.index))
                assert script[: len(choice.token_ids)] == list(choice.token_ids)
                left[choice.index] = script[len(choice.token_ids) :]
            self._running[request.request_id] = _Running(request, left)

    def abort(self, request_id: str, index: int | None = None) -> None:
        with self._lock:
            self.aborts.append((request_id, index))
            running = self._running.get(request_id)
            if running is None:
                return
            for at in list(running.left) if index is None else [index]:
                if running.left.pop(at, None) is not None:
                    self._last_words.append(
                        GenerationDelta(
                            request_id=request_id, index=at, finish_reason=FinishReason.ABORT
                        )
                    )
            if not running.left:
                del self._running[request_id]

    def _loop(self, publish: Publish) -> None:
        while not self._stop.is_set():
            time.sleep(self.step_s)
            if self.paused.is_set():
                continue
            with self._lock:
                deltas, self._last_words = self._last_words, []
                for running in list(self._running.values()):
                    deltas += self._advance(running)
            if deltas:
                self._step += 1
                publish(deltas, ReplicaStats(step=self._step, num_running=len(self._running)))

    def _advance(self, running: _Running) -> list[GenerationDelta]:
        request = running.request
        first, running.started = not running.started, True
        deltas = []
        for index in list(running.left):
            delta = (
                self._whole(request, index)
                if request.pooling is not None or not running.left[index]
                else self._token(running, index, first)
            )
            if delta.finish_reason is not None:
                del running.left[index]
            deltas.append(delta)
        if not running.left:
            self._running.pop(request.request_id, None)
        return deltas

    def _whole(self, request: GenerationRequest, index: int) -> GenerationDelta:
        embedding = tuple(float(t) for t in request.prompt_token_ids[:4])
        return GenerationDelta(
            request_id=request.request_id,
            index=index,
            embedding=embedding if request.pooling is not None else (),
            prompt_logprobs=_prompt_logprobs(request),
            finish_reason=FinishReason.LENGTH,
        )

    def _token(self, running: _Running, index: int, first: bool) -> GenerationDelta:
        request = running.request
        token_id = running.left[index].pop(0)
        stopped = token_id in request.params.stop_token_ids
        finish = FinishReason.STOP if stopped else None
        if finish is None and not running.left[index]:
            finish = FinishReason.LENGTH
        num_top = request.params.logprobs
        return GenerationDelta(
            request_id=request.request_id,
            index=index,
            token_ids=(token_id,),
            logprobs=() if num_top is None else (logprob_of(token_id, num_top),),
            prompt_logprobs=_prompt_logprobs(request) if first and index == 0 else (),
            finish_reason=finish,
            stop_token_id=token_id if stopped else None,
            num_cached_tokens=3 if first else 0,
        )


def _prompt_logprobs(request: GenerationRequest) -> tuple[TokenLogprob | None, ...]:
    num_top = request.params.prompt_logprobs
    if num_top is None:
        return ()
    return (None, *(logprob_of(t, num_top) for t in request.prompt_token_ids[1:]))
