"""What has come of one request: enough for another replica to go on behind it.

With the request itself, which holds prompt, seed and every other parameter, the tokens of each
choice are all there is to know: the next one is a function of them (decision 3). Four bytes a
token, never more than the context; adding to it costs the same at its end as at its beginning.
"""

from __future__ import annotations

import dataclasses
from array import array
from collections.abc import Iterable

from replicas.api import ChoiceProgress, GenerationDelta, GenerationRequest


class TokenLog:
    """The log of one request; choices by index."""

    def __init__(self, request: GenerationRequest) -> None:
        self._request = request
        self._token_ids = [array("I") for _ in range(request.params.n)]
        self._num_scored = [0] * request.params.n

    @property
    def num_tokens(self) -> int:
        """Output tokens of all choices."""
        return sum(map(len, self._token_ids))

    def add(self, delta: GenerationDelta) -> None:
        """What a step added to a choice."""
        self._token_ids[delta.index].extend(delta.token_ids)
        if delta.prompt_logprobs:
            self._num_scored[delta.index] += len(delta.prompt_logprobs)

    def rest(self, open_choices: Iterable[int]) -> GenerationRequest:
        """The request as it goes on elsewhere, with the choices that have not ended."""
        return dataclasses.replace(
            self._request,
            resumed=tuple(
                ChoiceProgress(
                    index=index,
                    token_ids=tuple(self._token_ids[index]),
                    num_scored_tokens=self._num_scored[index],
                )
                for index in sorted(open_choices)
            ),
        )
