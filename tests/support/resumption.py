"""Requests that are cut off in one engine and go on in another, as a gateway sees both."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from replicas.api import ChoiceProgress, GenerationDelta, GenerationRequest
from replicas.engine.sync_engine import Completion, SyncEngine


def resumed(request: GenerationRequest, told: Iterable[Completion]) -> GenerationRequest | None:
    """What is left of a request after what was told of it; None when nothing is."""
    progress = tuple(
        ChoiceProgress(
            index=completion.index,
            token_ids=tuple(completion.token_ids),
            num_scored_tokens=len(completion.prompt_logprobs),
        )
        for completion in told
        if completion.finish_reason is None
    )
    return dataclasses.replace(request, resumed=progress) if progress else None


def deltas_of(engine: SyncEngine, request: GenerationRequest) -> list[GenerationDelta]:
    """All that an engine says of a request."""
    engine.add(request)
    return list(engine.run())


def put_together(request: GenerationRequest, deltas: Iterable[GenerationDelta]) -> list[Completion]:
    """Choices in order, as far as the deltas go."""
    completions = [
        Completion(request_id=request.request_id, index=index) for index in range(request.params.n)
    ]
    for delta in deltas:
        assert completions[delta.index].finish_reason is None, "a delta after the last one"
        completions[delta.index].extend(delta)
    return completions


def cut_and_resumed(
    request: GenerationRequest, deltas: Sequence[GenerationDelta], cut: int, other: SyncEngine
) -> list[Completion]:
    """Choices of a request that was lost behind its first `cut` deltas and went on in `other`."""
    told = list(deltas[:cut])
    rest = resumed(request, put_together(request, told))
    return put_together(request, told + (deltas_of(other, rest) if rest else []))
