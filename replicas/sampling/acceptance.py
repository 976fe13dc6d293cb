"""How much of a draft is right: each drafted token is compared with the one sampled in its place.

The token sampled after a drafted one is what the request would have got there if, and only if, the
draft was right so far: logits, penalties and the random number of a position depend on the tokens
before it and on nothing else. So comparing is exact for greedy and for random sampling alike, and
no correction of the distribution is needed (unlike Leviathan et al. 2023, whose drafts are random).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

from replicas.sampling.sampler import SampledRow


def accepted(draft: Sequence[int], sampled: Sequence[SampledRow]) -> Sequence[SampledRow]:
    """The sampled rows that count: up to the first that is not the draft's token.

    A row that failed ends them before it: the next step meets the failure without a draft, where
    it is the request's own, and the tokens so far are told first.

    Args:
        draft: guessed tokens.
        sampled: one row more than the draft; row i was sampled after i tokens of it.

    Returns:
        At least one row; all but the last are tokens of the draft. Only the first can be a failure.
    """
    for at, row in enumerate(sampled):
        if row.error:
            return sampled[: max(1, at)]
        if at == len(draft) or row.token_id != draft[at]:
            return sampled[: at + 1]
    return sampled


def verdicts(
    drafts: Sequence[Sequence[int]], sampled: Sequence[SampledRow]
) -> Iterator[Sequence[SampledRow]]:
    """The rows that count of each request, see `accepted`.

    Args:
        drafts: one per request that samples; empty when no request of the step has one.
        sampled: rows of all of these requests, one after another.
    """
    if not drafts:
        for row in sampled:
            yield (row,)
        return
    rest = iter(sampled)
    for draft in drafts:
        yield accepted(draft, list(islice(rest, len(draft) + 1)))
