"""The experts of one rank: which a checkpoint gives it, how others are read, who moves them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch

from cluster.base.errors import InternalError
from moe.exchange.exchanges import Exchanges
from moe.exchange.wire import Combine, Dispatch, WireFormat
from moe.expert_table import starting_tables
from moe.spread_experts import SpreadExperts
from replicas.layers.weights import ResidentWeights
from replicas.models.checkpoint import load_unit
from replicas.models.context import torch_dtype
from replicas.models.hf_config import arch_from_hf
from replicas.models.mixture_weights import expert_unit
from replicas.worker.expert_mover import ExpertMover, ReadExpert
from replicas.worker.lockstep_groups import LockstepGroups
from replicas.worker.model_runner import ModelRunner
from replicas.worker.plan import WorkerPlan


def spread_experts(groups: LockstepGroups, plan: WorkerPlan) -> tuple[SpreadExperts, WireFormat]:
    """This rank's experts of a checkpoint and, if it is in a group, their exchanges.

    All members of a group call it together. Experts lie as the plan says, or as all replicas begin
    (see `starting_tables`).
    """
    place = groups.place
    arch = arch_from_hf(json.loads((Path(plan.model_path) / "config.json").read_text()))
    mixtures = {index: layer.moe for index, layer in enumerate(arch.layers) if layer.moe}
    format = WireFormat(
        dim=arch.model_dim,
        dtype=torch_dtype(plan.dtype),
        top_k=max(moe.gate.top_k for moe in mixtures.values()),
        dispatch=Dispatch(place.dispatch),
        combine=Combine(place.combine),
    )
    tables = place.tables or starting_tables(
        [(index, moe.gate.num_experts) for index, moe in mixtures.items()],
        len(place.node_of_W),
        place.num_redundant,
    )
    exchanges = None
    if not place.joins_later:
        exchanges = Exchanges(groups.peers, groups.peers.topology, format, row_work=groups.row_work)
    return SpreadExperts(tables, exchanges, plan.rank, place.capacity_factor), format


def resident_weights_of(runner: ModelRunner) -> ResidentWeights:
    """What experts can be moved in and out of.

    Raises:
        InternalError: the rank's weights are streamed.
    """
    if not isinstance(runner.weights, ResidentWeights):
        raise InternalError("Experts of a rank whose weights are streamed cannot move.")
    return runner.weights


def mover_of(
    experts: SpreadExperts, runner: ModelRunner, read_expert: ReadExpert
) -> ExpertMover | None:
    """None where weights are streamed: experts stay where they are."""
    if not isinstance(runner.weights, ResidentWeights):
        return None
    return ExpertMover(experts, runner.weights, read_expert)


def expert_reader(plan: WorkerPlan, runner: ModelRunner) -> ReadExpert:
    """Reads an expert as the rank's own were loaded."""
    arch, kernels = runner.model.arch, runner.model.kernels

    def read(layer: int, expert: int) -> Mapping[str, torch.Tensor]:
        unit = expert_unit(arch, layer, expert)
        tensors = load_unit(plan.model_path, unit, dtype=plan.dtype, kernels=kernels)
        if plan.device == "cpu":
            return tensors
        return {name: tensor.to(plan.device) for name, tensor in tensors.items()}

    return read
