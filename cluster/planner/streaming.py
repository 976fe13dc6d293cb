"""Which models are streamed, and how: budgets and demand into the policy search, a draft out.

A model is streamed because the user said so, or because it does not fit and `engine: auto` leaves
the choice here. The draft of a streamed model counts what its ranks will hold (resident weights,
ring, a cache of fixed size), so placement and packing treat it as any other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from cluster.base.env import default_cache_dir
from cluster.base.offload_spec import OffloadSpec
from cluster.planner.decisions import Decision
from cluster.planner.drafts import Draft, redraft
from cluster.planner.kv_sizing import MIN_AUTO_CONTEXT
from cluster.planner.memory import blocks_for
from cluster.planner.streaming_choice import Streaming
from cluster.planner.streaming_compression import open_compression
from cluster.planner.streaming_groups import refuse_with_groups, shared_shape
from cluster.planner.streaming_refusal import too_small
from cluster.planner.streaming_room import (
    Room,
    disk_path,
    memory_budgets,
    shares_resident,
)
from cluster.planner.streaming_settings import asked_micro_batch, open_choices, refuse_unpacked
from cluster.planner.streaming_trial import Chosen, Trial, search_steps, share_resident
from offload.machine_rates import RatesRequest, machine_rates
from offload.model_shape import ModelShape, model_shape
from offload.policy_search import Objective
from offload.rates import Rates
from offload.search_space import Budgets, Demand

MEAN_CONTEXT = 1024
"""Tokens that a running request is taken to hold on average, or its longest context if less."""
MEAN_PROMPT = 512
_CACHE_SHARE = 4
"""An automatic context is at most what this part of the device budget holds as cache."""

RatesSource = Callable[[RatesRequest], Rates]


def probed_rates(request: RatesRequest) -> Rates:
    """Speeds of this machine, from the cache or measured now."""
    return machine_rates(request, default_cache_dir())


@dataclass(frozen=True, slots=True, kw_only=True)
class Streamer:
    """Makes drafts of streamed models; `directory` anchors relative paths."""

    rates: RatesSource
    directory: Path

    def stream(self, draft: Draft, room: Room, *, why: str, fits: bool) -> Draft:
        """The model as an offload replica holds it; `why`, `fits` as in `Streaming`.

        Raises:
            ConfigError: its budgets do not fit the machine, or cannot hold what streaming needs.
        """
        asked = draft.source.spec.offload or OffloadSpec()
        num_sharing = draft.layout.dp_size
        if num_sharing > 1:
            refuse_with_groups(asked, draft.source.param("offload"))
        refuse_unpacked(draft, asked)
        draft = _own_dtype(draft)
        disk = disk_path(asked, self.directory)
        budgets = memory_budgets(draft, asked, room)
        spec = draft.source.spec
        model = _shape(draft)
        request = RatesRequest(
            device=draft.device.device,
            device_kind=room.device_kind,
            num_threads=room.num_threads,
            dtype=draft.dtype.value,
            disk=Path(disk),
        )
        rates = replace(self.rates(request), device_is_host=not draft.on_gpu)
        # The ranks of a node that read together have its disk together.
        rates = replace(rates, disk_bytes_per_s=rates.disk_bytes_per_s / num_sharing)
        shares = shares_resident(draft, asked, room)
        compression = open_compression(draft, asked, rates, shares=shares)
        model = replace(model, stored_share=compression.stored_share)
        choices = open_choices(draft, asked, model, compression.kinds)
        demand = _demand(draft, budgets, model)
        trial = Trial(
            draft=draft,
            model=model,
            rates=rates,
            budgets=budgets,
            demand=demand,
            objective=Objective(asked.objective),
            choices=choices,
            # In lock-step every rank has as many exchanges as the others: one a layer.
            micro_batch=asked_micro_batch(draft, asked) if num_sharing == 1 else 0,
        )
        chosen = search_steps(trial)
        if chosen is None:
            raise too_small(trial)
        if shares and isinstance(asked.device_memory, str):
            chosen = share_resident(trial, room.replicas, chosen)
        streaming = Streaming(
            why=why,
            fits=fits,
            disk_path=disk,
            model=model,
            rates=rates,
            budgets=_taken(chosen, asked, draft),
            demand=demand,
            found=chosen.found,
            block_size=draft.kv.block_size,
            is_packed=asked.pack,
            shares=shares,
            num_sharing=num_sharing,
            not_compressed=compression.why_not,
        )
        sized = redraft(
            draft,
            max_step_tokens=chosen.tokens,
            micro_batch_tokens=chosen.found.best.placement.micro_batch_tokens,
        )
        return _streamed(sized, streaming, spec.kv_cache.memory)


def _shape(draft: Draft) -> ModelShape:
    """What one rank has of the model; of several groups on a node, its part."""
    arch, num_sharing = draft.source.arch, draft.layout.dp_size
    model = model_shape(arch, draft.tp_size, draft.dtype.value)
    held = draft.layout.held_by(arch, 0)
    if held is None:
        return model
    # Experts are whole, not slices.
    whole = model_shape(arch, 1, draft.dtype.value)
    layers = tuple(
        replace(layer, experts=other.experts)
        for layer, other in zip(model.layers, whole.layers, strict=True)
    )
    counts = [len(experts) for experts in held]
    return shared_shape(replace(model, layers=layers), num_sharing, counts)


def _own_dtype(draft: Draft) -> Draft:
    """In the checkpoint's dtype unless the user chose: a wider one only streams more bytes."""
    own = draft.source.arch.dtype
    if draft.source.spec.dtype != "auto" or draft.dtype.value == own:
        return draft
    changed = redraft(draft, dtype=own)
    reason = "the checkpoint's own dtype: a wider one is more bytes to stream"
    return replace(changed, dtype=Decision(value=own, reason=reason))


def _taken(chosen: Chosen, asked: OffloadSpec, draft: Draft) -> Budgets:
    """The budgets; of host memory beside a GPU, where it was left open, what is used."""
    if not draft.on_gpu or isinstance(asked.host_memory, int):
        return chosen.budgets
    return replace(chosen.budgets, host_bytes=chosen.found.best.host_bytes)


def _demand(draft: Draft, budgets: Budgets, model: ModelShape) -> Demand:
    longest = draft.kv.max_context
    if isinstance(longest, str):
        host = 0 if budgets.host_holds_weights else budgets.host_bytes
        room = max(budgets.device_bytes // _CACHE_SHARE, host)
        held = room // model.kv_bytes_per_token
        least = min(MIN_AUTO_CONTEXT, draft.kv.max_position)
        longest = min(draft.kv.max_position, max(least, held))
    return Demand(
        max_rows=draft.source.spec.limits.max_running_requests,
        context_tokens=min(longest, MEAN_CONTEXT),
        max_context=blocks_for(longest, draft.kv.block_size) * draft.kv.block_size,
        prompt_tokens=min(longest, MEAN_PROMPT),
    )


def _streamed(draft: Draft, streaming: Streaming, kv_asked: int | str) -> Draft:
    best = streaming.found.best
    useful = draft.kv.useful_blocks * draft.kv.block_bytes
    kv_bytes = kv_asked if isinstance(kv_asked, int) else min(best.kv_bytes, useful)
    return replace(
        draft,
        weights_bytes=best.device_bytes,
        kv=replace(draft.kv, memory=kv_bytes),
        streaming=streaming,
    )
