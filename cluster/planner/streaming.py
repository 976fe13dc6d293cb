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
from cluster.base.errors import ConfigError
from cluster.base.quantities import size_text
from cluster.base.spec import OffloadSpec
from cluster.planner.decisions import Decision
from cluster.planner.drafts import Draft, redraft
from cluster.planner.kv_sizing import MIN_AUTO_CONTEXT
from cluster.planner.memory import blocks_for, sum_text
from cluster.planner.streaming_choice import Streaming
from offload.machine_rates import RatesRequest, machine_rates
from offload.model_shape import ModelShape, model_shape
from offload.policy_search import (
    Budgets,
    Choices,
    Demand,
    Found,
    Objective,
    least_expert_slots,
    search,
)
from offload.precision import Precision
from offload.rates import Rates

MEAN_CONTEXT = 1024
"""Tokens that a running request is taken to hold on average, or its longest context if less."""
MEAN_PROMPT = 512
_STEP_TOKENS = (512, 256, 128, 64, 32, 16)
"""Step sizes that are tried, the first that leaves room for everything else is the start."""
_CHUNK_SHARE = 8
"""A larger step may take this part of the device budget as its workspace."""
_CACHE_SHARE = 4
"""An automatic context is at most what this part of the device budget holds as cache."""

_SHARING_ROUNDS = 4

RatesSource = Callable[[RatesRequest], Rates]


def probed_rates(request: RatesRequest) -> Rates:
    """Speeds of this machine, from the cache or measured now."""
    return machine_rates(request, default_cache_dir())


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """What one rank may use on the emptiest node, processes not counted."""

    device_bytes: int
    alone_bytes: int
    """What one rank of a single replica could use."""
    replicas: int
    """Of the model on that node."""
    auto_share: float
    """Part of a node's memory that an automatic budget takes; of a GPU it takes all."""
    num_threads: int


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
        if draft.on_gpu:
            raise ConfigError(
                "Weights are streamed to the CPU only in this version.",
                "Set device: cpu.",
                param=draft.source.param("engine"),
            )
        _refuse_unpacked(draft, asked)
        draft = _own_dtype(draft)
        disk = disk_path(asked, self.directory)
        device = device_budget(draft, asked, room)
        # A CPU has one memory; the workspace is filled in later.
        budgets = Budgets(device_bytes=device, workspace_bytes=0, host_bytes=0)
        spec = draft.source.spec
        model = model_shape(draft.source.arch, draft.tp_size, draft.dtype.value)
        request = RatesRequest(
            device=draft.device.device,
            num_threads=room.num_threads,
            dtype=draft.dtype.value,
            disk=Path(disk),
        )
        rates = self.rates(request)
        choices = _choices(draft, asked, model)
        demand = _demand(draft, budgets, model)
        trial = _Trial(draft=draft, model=model, rates=rates, budgets=budgets, demand=demand)
        objective = Objective(asked.objective)
        result = _search(trial, objective, choices)
        if result is None:
            raise _too_small(trial, choices)
        shares = shares_resident(asked, room)
        if shares and isinstance(asked.device_memory, str):
            result = _with_shared(trial, objective, choices, room.replicas, result)
        tokens, budgets, found = result
        streaming = Streaming(
            why=why,
            fits=fits,
            disk_path=disk,
            model=model,
            rates=rates,
            budgets=budgets,
            demand=demand,
            found=found,
            is_packed=asked.pack,
            shares=shares,
        )
        return _streamed(redraft(draft, max_step_tokens=tokens), streaming, spec.kv_cache.memory)


def disk_path(asked: OffloadSpec, directory: Path) -> str:
    """Where weights go on disk; `directory` anchors a relative path."""
    if asked.disk_path == "auto":
        return str(default_cache_dir() / "weights")
    return str((directory / Path(asked.disk_path).expanduser()).absolute())


def _refuse_unpacked(draft: Draft, asked: OffloadSpec) -> None:
    """What only packed weights can do.

    Raises:
        ConfigError: it is asked for without packing.
    """
    if asked.pack:
        return
    for key, usual in (("precision", "native"), ("share_resident", "auto")):
        value = getattr(asked, key)
        if value not in (usual, "never"):
            raise ConfigError(
                f"{key} is {value} and pack is false: only packed weights can be so.",
                f"Leave {key} out, or pack.",
                param=draft.source.param(f"offload.{key}"),
            )


def shares_resident(asked: OffloadSpec, room: Room) -> bool:
    """Whether replicas of a node have the layers that stay in common."""
    if asked.share_resident == "auto":
        return room.replicas > 1 and asked.pack
    return asked.share_resident == "always"


def least_draft(draft: Draft) -> Draft:
    """The draft with the smallest cache that could serve anybody, to see whether it fits."""
    kv = draft.kv
    wanted = kv.max_context if isinstance(kv.max_context, int) else None
    context = wanted or min(MIN_AUTO_CONTEXT, kv.max_position)
    least = blocks_for(context, kv.block_size) * kv.block_bytes
    return replace(draft, kv=replace(kv, memory=max(kv.fixed_bytes, least)))


def _own_dtype(draft: Draft) -> Draft:
    """In the checkpoint's dtype unless the user chose: a wider one only streams more bytes."""
    own = draft.source.arch.dtype
    if draft.source.spec.dtype != "auto" or draft.dtype.value == own:
        return draft
    changed = redraft(draft, dtype=own)
    reason = "the checkpoint's own dtype: a wider one is more bytes to stream"
    return replace(changed, dtype=Decision(value=own, reason=reason))


def device_budget(draft: Draft, asked: OffloadSpec, room: Room) -> int:
    """Bytes of `device_memory`.

    Raises:
        ConfigError: more was asked than the machine has.
    """
    have = room.alone_bytes if shares_resident(asked, room) else room.device_bytes
    if isinstance(asked.device_memory, str):
        return max(0, int(room.device_bytes * room.auto_share))
    if asked.device_memory > have:
        raise ConfigError(
            f"device_memory {size_text(asked.device_memory)} is asked for each rank, and "
            f"{size_text(max(0, have))} are left for it.",
            f"Lower it to {size_text(max(0, have))}, or leave it to auto.",
            param=draft.source.param("offload.device_memory"),
        )
    return asked.device_memory


def _choices(draft: Draft, asked: OffloadSpec, model: ModelShape) -> Choices:
    """What the user left open.

    Raises:
        ConfigError: `resident` or `ring_slots` leaves nothing to stream.
    """
    layers = len(model.layers)
    resident = None if isinstance(asked.resident, str) else asked.resident
    slots = (2, 3, 4) if isinstance(asked.ring_slots, str) else (asked.ring_slots,)
    streamed = layers - (resident or 0)
    if streamed < min(slots):
        slots = (1,) if isinstance(asked.ring_slots, str) and streamed == 1 else slots
    if streamed < min(slots):
        key = "ring_slots" if streamed >= 1 else "resident"
        raise ConfigError(
            f"Of {layers} layers {max(0, streamed)} are left to stream through {min(slots)} slots.",
            "Lower `resident` or `ring_slots`, or delete the `offload` section.",
            param=draft.source.param(f"offload.{key}"),
        )
    every = tuple(Precision)
    precisions = every if asked.precision == "auto" else (Precision(asked.precision),)
    return Choices(precisions=precisions, ring_slots=slots, resident_layers=resident)


def _demand(draft: Draft, budgets: Budgets, model: ModelShape) -> Demand:
    longest = draft.kv.max_context
    if isinstance(longest, str):
        held = budgets.device_bytes // _CACHE_SHARE // model.kv_bytes_per_token
        least = min(MIN_AUTO_CONTEXT, draft.kv.max_position)
        longest = min(draft.kv.max_position, max(least, held))
    return Demand(
        max_rows=draft.source.spec.limits.max_running_requests,
        context_tokens=min(longest, MEAN_CONTEXT),
        max_context=blocks_for(longest, draft.kv.block_size) * draft.kv.block_size,
        prompt_tokens=min(longest, MEAN_PROMPT),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Trial:
    """A search's inputs but for the step size."""

    draft: Draft
    model: ModelShape
    rates: Rates
    budgets: Budgets
    demand: Demand

    def with_step(self, tokens: int) -> Budgets:
        """Budgets with the workspace of steps of `tokens`."""
        space = redraft(self.draft, max_step_tokens=tokens).space
        workspace = space.total_bytes - space.process_bytes
        fixed = self.draft.kv.memory
        kv_bytes = None if isinstance(fixed, str) else fixed
        return replace(self.budgets, workspace_bytes=workspace, kv_bytes=kv_bytes)

    def sizes(self) -> tuple[int, ...]:
        """Step sizes to try."""
        wanted = self.draft.source.spec.limits.max_step_tokens
        return _STEP_TOKENS if isinstance(wanted, str) else (wanted,)


def _search(
    trial: _Trial, objective: Objective, choices: Choices
) -> tuple[int, Budgets, Found] | None:
    """Step size, budgets and placement; None when nothing fits."""
    for tokens in trial.sizes():
        budgets = trial.with_step(tokens)
        found = search(
            trial.model,
            trial.rates,
            budgets,
            replace(trial.demand, max_rows=min(trial.demand.max_rows, tokens)),
            objective,
            choices,
        )
        if found is not None:
            break
    else:
        return None
    if len(trial.sizes()) == 1:
        return tokens, budgets, found
    return _balanced(trial, objective, choices, (tokens, budgets, found))


def _with_shared(
    trial: _Trial,
    objective: Objective,
    choices: Choices,
    replicas: int,
    result: tuple[int, Budgets, Found],
) -> tuple[int, Budgets, Found]:
    """The search with what replicas save by sharing, divided among them.

    With R resident bytes n replicas of budget b take n b - (n - 1) R of the node. A budget of
    b + R (n - 1) / n so takes no more than n b as long as at least R stay.
    """
    for _ in range(_SHARING_ROUNDS):
        kept = result[2].best.placement.resident_bytes(trial.model)
        budget = trial.budgets.device_bytes + kept * (replicas - 1) // replicas
        wider = replace(trial, budgets=replace(trial.budgets, device_bytes=budget))
        again = _search(wider, objective, choices)
        if again is None or again[2].best.placement.resident_bytes(trial.model) < kept:
            break
        result = again
    return result


def _balanced(
    trial: _Trial, objective: Objective, choices: Choices, start: tuple[int, Budgets, Found]
) -> tuple[int, Budgets, Found]:
    """The step moved to the balance batch: tokens below it are free, memory permitting."""
    tokens, budgets, found = start
    target = found.chunk_tokens
    while target > tokens:
        wider = trial.with_step(target)
        if wider.workspace_bytes <= trial.budgets.device_bytes // _CHUNK_SHARE:
            again = search(trial.model, trial.rates, wider, trial.demand, objective, choices)
            if again is not None and again.best.tokens_per_s >= 0.98 * found.best.tokens_per_s:
                return target, wider, again
        target //= 2
    if found.chunk_tokens < tokens:
        return max(_STEP_TOKENS[-1], found.chunk_tokens), budgets, found
    return tokens, budgets, found


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


def _too_small(trial: _Trial, choices: Choices) -> ConfigError:
    """The least that could work, part by part, and what would make it less."""
    draft = trial.draft
    fixed, longest = draft.kv.memory, trial.demand.max_context
    one_request = longest * trial.model.kv_bytes_per_token
    if isinstance(fixed, int) and draft.kv.fixed_bytes and fixed < one_request:
        return ConfigError(
            f"A cache of {size_text(fixed)} is asked for each rank, and one request of {longest} "
            f"tokens takes {size_text(one_request)}.",
            f"Raise kv_cache.memory to {size_text(one_request)}, or lower limits.max_context.",
            param=draft.source.param("kv_cache.memory"),
        )
    precision = min(choices.precisions, key=trial.model.layer_bytes)
    parts = _least_parts(trial, choices, precision)
    need, have = sum(parts.values()), trial.budgets.device_bytes
    key = "offload.device_memory" if draft.source.spec.offload else "engine"
    remedies = [f"raise offload.device_memory to {size_text(need)}"]
    least = sum(_least_parts(trial, choices, Precision.INT4).values())
    if precision is not Precision.INT4 and least <= have:
        remedies.append("set offload.precision to int4")
    if draft.kv.fixed_bytes:
        remedies.append("lower kv_cache.memory")
    elif isinstance(draft.kv.max_context, int):
        remedies.append("lower limits.max_context")
    return ConfigError(
        f"Too little device memory to stream the weights: asked {sum_text(parts)}; have "
        f"{size_text(have)} for each rank.",
        _sentence(remedies),
        param=draft.source.param(key),
    )


def _least_parts(trial: _Trial, choices: Choices, precision: Precision) -> dict[str, int]:
    """What the smallest placement takes, by part."""
    model, budgets = trial.model, trial.with_step(trial.sizes()[-1])
    resident, slots = choices.resident_layers or 0, min(choices.ring_slots)
    layers = model.layers[resident:]
    streamed = [layer.base.record_bytes(precision) for layer in layers]
    expert = max((layer.largest_expert_bytes(precision) for layer in layers), default=0)
    experts = least_expert_slots(model) if expert else 0
    slot = max(streamed + [unit.native_bytes for unit in model.fixed_units])
    context = trial.demand.max_context
    parts = {
        f"{resident} resident layers": sum(
            layer.record_bytes(precision) for layer in model.layers[:resident]
        ),
        f"ring of {slots} x {size_text(slot)}": slots * slot,
        f"{experts} x {size_text(expert)} for experts": experts * expert,
        f"cache of one request of {context} tokens": budgets.kv_bytes
        or context * model.kv_bytes_per_token,
        "workspace": budgets.workspace_bytes,
    }
    return {name: size for name, size in parts.items() if size}


def _sentence(remedies: list[str]) -> str:
    text = ", or ".join(remedies)
    return f"{text[0].upper()}{text[1:]}."
