"""The cluster as data: what ListModels and Status answer, and what operators and tests read."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from replicas.leader.record import ExpertRecord
from router.api import ModelInfo
from router.directory import Member, ReplicaDirectory
from router.served_model import ServedModel


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
    detail = record.detail
    if not detail and member.stream is not None and not member.stream.connected:
        detail = member.stream.last_error
    experts = record.experts or ExpertRecord()
    return {
        "replica_id": record.replica_id,
        "model": record.model,
        "state": record.state.value,
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
