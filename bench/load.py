"""A closed-loop load generator over gRPC or OpenAI's HTTP, run as a process of its own.

`concurrency` clients each send their next request when the last one ended; every prompt is new
(seeded random token ids of one length), EOS is ignored, so each request yields exactly `max_tokens`
tokens. Clients begin `stagger_s` apart and pause `think_s` on average between requests: a herd that
starts at once stays one, and arrivals must not know when a step ends. Times are taken at the
client, from the moment a request was due: neither what the client is late by nor what it does with
an answer makes its pause longer. Bare parsers of both wires, because the client's own CPU is part
of the load.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import random
import selectors
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from bench.grpc_wire import StreamingClient
from bench.http_stream import stream_completion
from router.proto import penstock_pb2 as pb

_GENERATE = f"/{pb.DESCRIPTOR.services_by_name['Penstock'].full_name}/Generate"
_TYPES = {"str": str, "int": int, "float": float}


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What to send."""

    target: str
    model: str
    concurrency: int
    num_requests: int
    prompt_tokens: int
    max_tokens: int
    vocab_size: int
    seed: int
    stagger_s: float
    think_s: float
    front: str = "grpc"
    """`grpc` (ours) or `http` (/v1/completions of whatever listens at `target`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestTrace:
    """One request as its client saw it, seconds since it was due."""

    ttft_s: float
    e2e_s: float
    num_tokens: int

    @property
    def tpot_s(self) -> float:
        """Mean time per token after the first."""
        return (self.e2e_s - self.ttft_s) / max(1, self.num_tokens - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadResult:
    """All requests of one run."""

    wall_s: float
    """To the end of the last answer; no pause follows it."""
    requests: tuple[RequestTrace, ...]

    @property
    def tokens_per_s(self) -> float:
        """Output tokens of the whole run over its wall time."""
        return sum(request.num_tokens for request in self.requests) / self.wall_s


def prompts(load: Load) -> list[list[int]]:
    """The seeded prompts of a load, the same for whoever runs it."""
    random_ids = random.Random(load.seed)
    return [
        [random_ids.randrange(10, load.vocab_size) for _ in range(load.prompt_tokens)]
        for _ in range(load.num_requests)
    ]


def think_times(load: Load, client: int) -> Iterator[float]:
    """A client's seeded pauses between requests, the same for whoever runs the load."""
    pauses = random.Random(load.seed * 1000 + client)
    while True:
        yield pauses.uniform(0.0, 2 * load.think_s)


Request = Any
"""A prompt as a front takes it, made before the load begins: that is no part of anyone's answer."""

Send = Callable[[Request, float], Awaitable[RequestTrace]]
"""Sends a request that was due at some time (`time.perf_counter`)."""


async def run(load: Load) -> LoadResult:
    """Send the load and wait for every answer."""
    make = _completion if load.front == "http" else _message
    waiting = [make(load, prompt) for prompt in reversed(prompts(load))]
    traces: list[RequestTrace] = []
    started_s = ended_s = 0.0
    async with _sender(load) as send:

        async def client(index: int) -> None:
            nonlocal ended_s
            pauses = think_times(load, index)
            due_s = started_s + index * load.stagger_s
            while waiting:
                await asyncio.sleep(due_s - time.perf_counter())
                if waiting:
                    traces.append(await send(waiting.pop(), due_s))
                    answered_s = due_s + traces[-1].e2e_s
                    ended_s = max(ended_s, answered_s)
                    due_s = answered_s + next(pauses)

        started_s = time.perf_counter()
        await asyncio.gather(*(client(index) for index in range(load.concurrency)))
    return LoadResult(wall_s=ended_s - started_s, requests=tuple(traces))


def drive(load: Load) -> LoadResult:
    """Run the load generator in its own process."""
    command = [sys.executable, "-m", "bench.load"]
    for name, value in dataclasses.asdict(load).items():
        command += ["--" + name.replace("_", "-"), str(value)]
    answer = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result = json.loads(answer.stdout)
    return LoadResult(
        wall_s=result["wall_s"],
        requests=tuple(RequestTrace(**request) for request in result["requests"]),
    )


@asynccontextmanager
async def _sender(load: Load) -> AsyncIterator[Send]:
    if load.front == "http":
        yield partial(_over_http, load)
        return
    client = await StreamingClient.connect(load.target)
    try:
        yield partial(_over_grpc, client, load)
    finally:
        client.close()


def _completion(load: Load, prompt: list[int]) -> Request:
    return {
        "model": load.model,
        "prompt": prompt,
        "max_tokens": load.max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def _message(load: Load, prompt: list[int]) -> Request:
    sampling = pb.SamplingOptions(temperature=0, max_tokens=load.max_tokens, ignore_eos=True)
    return pb.GenerateRequest(
        model=load.model, token_ids=pb.TokenIds(ids=prompt), sampling=sampling
    ).SerializeToString()


async def _over_http(load: Load, body: Request, due_s: float) -> RequestTrace:
    answer = await stream_completion(load.target, body)
    return _checked(load, answer.num_tokens, (due_s, answer.first_s, answer.ended_s))


async def _over_grpc(
    client: StreamingClient, load: Load, request: Request, due_s: float
) -> RequestTrace:
    arrivals, ended_s = await client.call(_GENERATE, request)
    first_s = 0.0
    num_tokens = 0
    for arrived_s, message in arrivals:
        piece = pb.GenerateResponse.FromString(message)
        if not num_tokens and piece.token_ids:
            first_s = arrived_s
        num_tokens += len(piece.token_ids)
    return _checked(load, num_tokens, (due_s, first_s, ended_s))


def _checked(load: Load, num_tokens: int, times_s: tuple[float, float, float]) -> RequestTrace:
    due_s, first_s, ended_s = times_s
    if num_tokens != load.max_tokens:
        raise RuntimeError(f"asked for {load.max_tokens} tokens, got {num_tokens}")
    return RequestTrace(ttft_s=first_s - due_s, e2e_s=ended_s - due_s, num_tokens=num_tokens)


def _punctual_loop() -> asyncio.AbstractEventLoop:
    """A loop whose timers keep microseconds; epoll would round each pause up to milliseconds."""
    return asyncio.SelectorEventLoop(selectors.SelectSelector())


def main() -> None:
    """Run one load described by flags and print the result as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    for field in dataclasses.fields(Load):
        flag = "--" + field.name.replace("_", "-")
        parser.add_argument(flag, type=_TYPES[str(field.type)], required=True)
    load = Load(**vars(parser.parse_args()))
    with asyncio.Runner(loop_factory=_punctual_loop) as runner:
        result = runner.run(run(load))
    json.dump(dataclasses.asdict(result), sys.stdout)


if __name__ == "__main__":
    main()
