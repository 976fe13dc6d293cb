"""The cluster as data: what ListModels and Status answer, and what operators and tests read."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from replicas.leader.record import ExpertRecord, ReplicaState
from router.api import ModelInfo
from router.directory import Member, ReplicaDirectory
from router.served_model import ServedModel

UNREACHABLE = "unreachable"
"""State of a replica that was ready, and that this gateway has lost."""


def model_infos(models: Mapping[str, ServedModel], directory: ReplicaDirectory) -> list[ModelInfo]:
    """One entry per served model."""
    return [
        ModelInfo(
            name=name,
            family=model.plan.family,
            engine=model.plan.engine.value,
            max_context=model.max_tokens_per_choice,
            vocab_size=model.plan.vocab_size,
            ready_replicas=sum(member.ready for member in directory.members(name)),
            replicas=model.plan.replicas,
            chat=model.chat_template is not None,
            created=model.created,
            shared_weight_bytes=model.plan.memory.shared_bytes,
        )
        for name, model in models.items()
    ]


def cluster_status(
    models: Mapping[str, ServedModel], directory: ReplicaDirectory
) -> dict[str, Any]:
    """Replicas and models; keys follow the proto's StatusResponse."""
    return {
        "replicas": [_replica(member) for member in directory.members()],
        "models": [dataclasses.asdict(info) for info in model_infos(models, directory)],
    }


def _replica(member: Member) -> dict[str, Any]:
    record, load = member.record, member.load
    state, detail = record.state.value, record.detail
    lost = "" if member.stream is None or member.stream.connected else member.stream.last_error
    if lost:
        # A leader that was killed says nothing more: its last word stands until it expires.
        state = UNREACHABLE if record.state is ReplicaState.READY else state
        detail = detail or lost
    experts = record.experts or ExpertRecord()
    return {
        "replica_id": record.replica_id,
        "model": record.model,
        "state": state,
        "detail": detail,
        "endpoint": record.endpoint,
        "pid": record.pid,
        "node": record.node,
        "epoch": record.epoch,
        "workers": [dataclasses.asdict(worker) for worker in record.workers],
        "startup_s": dict(record.startup_s),
        "expert_layers": [dataclasses.asdict(layer) for layer in experts.layers],
        "expert_rows_dropped": experts.num_dropped,
        "expert_table": experts.table,
        "expert_moves": experts.num_moves,
        **({"loss": dataclasses.asdict(record.loss)} if record.loss is not None else {}),
        **{
            name: value
            for name, value in dataclasses.asdict(load).items()
            if name != "num_waiting_tokens"
        },
    }
