"""A closed-loop load generator over gRPC, run as a process of its own.

`concurrency` clients each send their next request when the last one ended; every prompt is new
(seeded random token ids of one length), EOS is ignored, so each request yields exactly `max_tokens`
tokens. Clients begin `stagger_s` apart and pause `think_s` on average between requests: a herd that
starts at once stays one, and arrivals must not know when a step ends. Times are taken at the
client. Raw stubs, because the client's own CPU is part of the machine's load.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

import grpc.aio

from router.proto import penstock_pb2 as pb
from router.proto import penstock_pb2_grpc as pb_grpc

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


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestTrace:
    """One request as its client saw it, seconds."""

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


async def run(load: Load) -> LoadResult:
    """Send the load and wait for every answer."""
    waiting = list(reversed(prompts(load)))
    traces: list[RequestTrace] = []
    async with grpc.aio.insecure_channel(load.target) as channel:
        stub = pb_grpc.PenstockStub(channel)

        async def client(index: int) -> None:
            pauses = think_times(load, index)
            await asyncio.sleep(index * load.stagger_s)
            while waiting:
                traces.append(await _one(stub, load, waiting.pop()))
                await asyncio.sleep(next(pauses))

        started_s = time.perf_counter()
        await asyncio.gather(*(client(index) for index in range(load.concurrency)))
        wall_s = time.perf_counter() - started_s
    return LoadResult(wall_s=wall_s, requests=tuple(traces))


async def _one(stub: pb_grpc.PenstockStub, load: Load, prompt: list[int]) -> RequestTrace:
    sampling = pb.SamplingOptions(temperature=0, max_tokens=load.max_tokens, ignore_eos=True)
    request = pb.GenerateRequest(
        model=load.model, token_ids=pb.TokenIds(ids=prompt), sampling=sampling
    )
    started_s = time.perf_counter()
    first_s = 0.0
    num_tokens = 0
    async for piece in stub.Generate(request, timeout=600):
        if not num_tokens and piece.token_ids:
            first_s = time.perf_counter()
        num_tokens += len(piece.token_ids)
    ended_s = time.perf_counter()
    if num_tokens != load.max_tokens:
        raise RuntimeError(f"asked for {load.max_tokens} tokens, got {num_tokens}")
    return RequestTrace(
        ttft_s=first_s - started_s, e2e_s=ended_s - started_s, num_tokens=num_tokens
    )


def main() -> None:
    """Run one load described by flags and print the result as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    for field in dataclasses.fields(Load):
        flag = "--" + field.name.replace("_", "-")
        parser.add_argument(flag, type=_TYPES[str(field.type)], required=True)
    result = asyncio.run(run(Load(**vars(parser.parse_args()))))
    json.dump(dataclasses.asdict(result), sys.stdout)


if __name__ == "__main__":
    main()
