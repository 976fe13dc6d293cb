"""The cluster file's sections on how an engine runs: cache, limits, resources, drafts, overflow.

Part of the spec: see `spec.py`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from cluster.base.quantities import Duration, Real, Size, Whole
from cluster.base.rules import Choice, Flag, Text
from cluster.base.section import Auto, Section

KIB, TIB = 2**10, 2**40


class KvCacheSpec(Section):
    """The paged key/value cache of each replica."""

    memory: Annotated[int | Auto, Size(64 * KIB, 16 * TIB, auto=True)] = Field(
        default="auto",
        description="Cache memory of each rank. auto: a share of what the weights leave, but "
        "no more than `max_running_requests` requests of `max_context` tokens can fill.",
    )
    block_size: Annotated[int, Whole(1, 256)] = Field(
        default=16, description="Tokens per block, the unit of allocation and of prefix sharing."
    )
    prefix_caching: Annotated[bool, Flag()] = Field(
        default=True, description="Reuse the blocks of prompts that start alike."
    )


class EngineLimitsSpec(Section):
    """Limits of each replica's scheduler."""

    max_context: Annotated[int | Auto, Whole(1, 2**27, auto=True)] = Field(
        default="auto",
        description="Longest prompt plus output, in tokens. auto: what the model was made for, "
        "or less when the cache cannot hold it.",
    )
    max_running_requests: Annotated[int, Whole(1, 4096)] = Field(
        default=64,
        description="Requests that one step may advance, in each data-parallel group.",
    )
    max_step_tokens: Annotated[int | Auto, Whole(1, 131_072, auto=True)] = Field(
        default="auto",
        description="Tokens that one step may compute, in each data-parallel group; longer prompts "
        "are computed in pieces. auto: 512; of an offload replica as many as the transfer of the "
        "weights hides.",
    )
    max_waiting_requests: Annotated[int, Whole(1, 65_536)] = Field(
        default=256, description="Requests that may wait in a replica; more are refused (429)."
    )
    step_timeout: Annotated[float, Duration(0.1, 3600)] = Field(
        default=10.0,
        description="A step without an answer for this long means a hung rank; the replica is "
        "then replaced.",
    )
    max_rank_restarts: Annotated[int, Whole(0, 1000)] = Field(
        default=0,
        description="Times in an hour that a replica replaces ranks it has lost and goes on: its "
        "requests wait, and get the tokens they would have got. Beyond that, and with 0, they end "
        "with an error and the replica starts anew.",
    )


class ResourcesSpec(Section):
    """What each rank takes of its node."""

    threads_per_rank: Annotated[int | Auto, Whole(1, 1024, auto=True)] = Field(
        default="auto",
        description="Compute threads of a rank on the CPU. auto: the node's cores divided by "
        "all ranks on it.",
    )
    cpus_per_rank: Annotated[float | Auto, Real(0.01, 1024, auto=True)] = Field(
        default="auto",
        description="Logical CPUs that Ray reserves for a rank; fractions are allowed. auto: the "
        "threads of the rank, or its fair share when the node has fewer cores.",
    )


class SpeculationSpec(Section):
    """Guesses at the next tokens, checked together in one step; answers are the same without."""

    method: Annotated[Literal["ngram", "none"], Choice(("ngram", "none"))] = Field(
        default="ngram",
        description="ngram: what followed the latest tokens where they stood before, in the "
        "prompt or the output (prompt lookup); pays where answers quote their prompt. none: no "
        "guesses.",
    )
    num_speculative_tokens: Annotated[int, Whole(1, 64)] = Field(
        default=16,
        description="Most guessed tokens of a request in a step. Fewer are tried while guesses "
        "come true less often, and none where they hardly do.",
    )
    prompt_lookup_min: Annotated[int, Whole(1, 16)] = Field(
        default=2, description="Tokens that have to be the same for a guess."
    )
    prompt_lookup_max: Annotated[int, Whole(1, 16)] = Field(
        default=4,
        description="Tokens that are compared to choose the best of several places.",
    )


class OverflowSpec(Section):
    """Where generations go that the model's replicas cannot take; the answer's headers say so."""

    to: Annotated[
        str,
        Text("letters, digits, `.`, `_` and `-`", r"[A-Za-z0-9][A-Za-z0-9._-]*", 64),
    ] = Field(
        description="Name of another entry with the same checkpoint, such as one with "
        "`engine: offload` and a longer `max_context`. It gets what is too long for this model, "
        "and what this one's replicas have no room for."
    )
    waiting: Annotated[int | Auto, Whole(1, 65_536, auto=True)] = Field(
        default="auto",
        description="Requests waiting in every replica from which on new ones go over. auto: "
        "`limits.max_waiting_requests`, so only what would be refused.",
    )
