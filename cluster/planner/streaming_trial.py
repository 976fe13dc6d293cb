"""The policy search at every size of step: what a step's computation takes is part of its budget.

A pass of a streamed model costs a transfer of the weights whatever it computes, so the step grows
to the balance batch where its workspace leaves room; cut into micro-batches it takes little more
than one of them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from cluster.planner.drafts import Draft, redraft
from offload.model_shape import ModelShape
from offload.policy_search import Found, Objective, search
from offload.rates import Rates
from offload.search_space import Activations, Budgets, Choices, Demand

_STEP_TOKENS = (512, 256, 128, 64, 32, 16)
"""Step sizes that are tried, the first that leaves room for everything else is the start."""
_MICRO_BATCHES = (512, 128, 32)
"""Micro-batches that are tried for a step with more tokens."""
_CHUNK_SHARE = 8
"""A larger step may add this part of the device budget to its workspace."""
_SHARING_ROUNDS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """A search's inputs but for the step size."""

    draft: Draft
    model: ModelShape
    rates: Rates
    budgets: Budgets
    demand: Demand
    objective: Objective
    choices: Choices
    micro_batch: int | None = None
    """Most tokens that a layer may compute at a time, where the user says so."""

    def with_step(self, tokens: int) -> Budgets:
        """Budgets with the workspace of whole steps of `tokens`."""
        fixed = self.draft.kv.memory
        kv_bytes = None if isinstance(fixed, str) else fixed
        workspace = self._workspace(tokens, 0)
        return replace(self.budgets, workspace_bytes=workspace, kv_bytes=kv_bytes)

    def cuts(self, tokens: int) -> tuple[Activations, ...]:
        """Ways to compute steps of `tokens`."""
        tried = (0, *_MICRO_BATCHES) if self.micro_batch is None else (self.micro_batch,)
        sizes = dict.fromkeys(size if size < tokens else 0 for size in tried)
        return tuple(
            Activations(micro_batch_tokens=size, workspace_bytes=self._workspace(tokens, size))
            for size in sizes
        )

    def sizes(self) -> tuple[int, ...]:
        """Step sizes to try."""
        wanted = self.draft.source.spec.limits.max_step_tokens
        return _STEP_TOKENS if isinstance(wanted, str) else (wanted,)

    def search(self, tokens: int, max_workspace: int | None = None) -> Chosen | None:
        """The best placement for steps of `tokens`; None when nothing fits.

        Args:
            max_workspace: bytes that a step's computation may take; None: what fits.
        """
        cuts = [
            cut
            for cut in self.cuts(tokens)
            if max_workspace is None or cut.workspace_bytes <= max_workspace
        ]
        if not cuts:
            return None
        budgets = self.with_step(tokens)
        found = search(
            self.model,
            self.rates,
            budgets,
            replace(self.demand, max_rows=min(self.demand.max_rows, tokens)),
            self.objective,
            replace(self.choices, activations=tuple(cuts)),
        )
        return None if found is None else Chosen(tokens=tokens, budgets=budgets, found=found)

    def _workspace(self, tokens: int, micro_batch: int) -> int:
        draft = redraft(self.draft, max_step_tokens=tokens, micro_batch_tokens=micro_batch)
        return draft.space.total_bytes - draft.space.process_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """A step size, and what was found for it under which budgets."""

    tokens: int
    budgets: Budgets
    found: Found


def search_steps(trial: Trial) -> Chosen | None:
    """Step size, budgets and placement; None when nothing fits."""
    chosen = next(filter(None, map(trial.search, trial.sizes())), None)
    if chosen is None or len(trial.sizes()) == 1:
        return chosen
    return _balanced(trial, chosen)


def share_resident(trial: Trial, replicas: int, chosen: Chosen) -> Chosen:
    """The search with what replicas save by sharing, divided among them.

    With R resident bytes n replicas of budget b take n b - (n - 1) R of the node. A budget of
    b + R (n - 1) / n so takes no more than n b as long as at least R stay.
    """
    for _ in range(_SHARING_ROUNDS):
        kept = chosen.found.best.placement.resident_bytes(trial.model)
        budget = trial.budgets.device_bytes + kept * (replicas - 1) // replicas
        wider = replace(trial, budgets=replace(trial.budgets, device_bytes=budget))
        again = search_steps(wider)
        if again is None or again.found.best.placement.resident_bytes(trial.model) < kept:
            break
        chosen = again
    return chosen


def _balanced(trial: Trial, start: Chosen) -> Chosen:
    """The step moved to the balance batch: tokens below it are free, memory permitting."""
    target = start.found.chunk_tokens
    least = min(cut.workspace_bytes for cut in trial.cuts(start.tokens))
    while target > start.tokens:
        again = trial.search(target, least + trial.budgets.device_bytes // _CHUNK_SHARE)
        if again and again.found.best.tokens_per_s >= 0.98 * start.found.best.tokens_per_s:
            return again
        target //= 2
    if start.found.chunk_tokens < start.tokens:
        # A smaller step needs less beside it, and may so be followed by a larger batch.
        smaller = max(_STEP_TOKENS[-1], start.found.chunk_tokens)
        return trial.search(smaller) or start
    return start
