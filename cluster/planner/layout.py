"""How one replica is split over ranks: tensor parallel, or data-parallel groups that share experts.

Decides `parallel.ep` and the kind of engine where the file left them open, and refuses what cannot
work, with the arithmetic. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cluster.base.errors import ConfigError
from cluster.base.moe_spec import MoeSectionSpec
from cluster.base.spec import ModelSpec
from cluster.planner.decisions import why_experts_on_cpus
from cluster.planner.memory import expert_bytes
from cluster.planner.streaming_groups import refuse_moves
from moe.expert_table import ExpertTable, starting_tables
from moe.reassign import spare_slots
from replicas.models.arch import ArchConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """The ranks of one replica: `dp_size` groups of `tp_size`."""

    tp_size: int
    dp_size: int = 1
    spreads_experts: bool = False
    """Experts are held whole, spread over all ranks; else each is sliced over the tp ranks."""
    num_redundant: int = 0
    """Copies of other ranks' experts on each rank, in every layer."""
    max_moves: int = 0
    """Experts that a rank may be fetching beside those it holds."""
    survives: bool = False
    """Groups that are left go on when others are lost."""
    lost_groups: int = 0
    """Groups whose experts the others have room for."""
    is_failover_open: bool = False
    """The file leaves `lost_groups` to the memory there is."""
    reason: str = ""
    """Why this kind of engine, when the file left it open."""

    @property
    def num_ranks(self) -> int:
        """Ranks of one replica."""
        return self.dp_size * self.tp_size

    def held_by(self, arch: ArchConfig, rank: int) -> Sequence[Sequence[int]] | None:
        """The routed experts of each layer that a rank holds whole; None: a slice of all."""
        if not self.spreads_experts:
            return None
        held: list[Sequence[int]] = [()] * arch.num_layers
        for table in self._tables(arch):
            held[table.layer] = table.logical_by_rank[rank]
        return held

    def experts_per_rank(self, arch: ArchConfig) -> tuple[int, ...]:
        """Routed experts of each rank, in the layer that has most."""
        counts = [table.slots.counts for table in self._tables(arch)]
        return max(counts, key=sum)

    def spare_slots(self, arch: ArchConfig) -> dict[int, int]:
        """Experts that each rank can take in when groups are lost, by mixture layer."""
        if not self.lost_groups:
            return {}
        return {
            table.layer: spare_slots(table, self.tp_size, self.lost_groups)
            for table in self._tables(arch)
        }

    def spare_bytes(self, arch: ArchConfig, dtype: str) -> int:
        """What a rank keeps free to take experts in; the one that is being read is there twice."""
        if not self.survives:
            return 0
        each = {
            index: expert_bytes(arch, index, dtype)
            for index, layer in enumerate(arch.layers)
            if layer.moe
        }
        taken = sum(count * each[layer] for layer, count in self.spare_slots(arch).items())
        return taken + max(each.values())

    def _tables(self, arch: ArchConfig) -> tuple[ExpertTable, ...]:
        sizes = [
            (i, layer.moe.gate.num_experts) for i, layer in enumerate(arch.layers) if layer.moe
        ]
        return starting_tables(sizes, self.num_ranks, self.num_redundant)


def choose_layout(spec: ModelSpec, arch: ArchConfig, param: str) -> Layout:
    """The layout of `models[i]`.

    Args:
        param: key path of the entry, for errors.

    Raises:
        ConfigError: the entry contradicts itself or the model.
    """
    tp, dp, wanted = spec.parallel.tp, spec.parallel.dp, spec.engine
    streams = wanted == "offload" and dp > 1
    if wanted not in ("auto", "expert_parallel") and not streams:
        _refuse_groups(spec, param)
        return Layout(tp_size=tp)
    if not arch.has_experts:
        _refuse_dense(spec, param)
        reason = "the model is dense: every rank takes part in every token"
        return Layout(tp_size=tp, reason=reason if wanted == "auto" else "")
    ep = _resolve_ep(spec)
    _check_ep(spec, ep, arch, param)
    if ep == 1:
        reason = "ep is 1: every rank holds a slice of every expert"
        return Layout(tp_size=tp, reason=reason if wanted == "auto" else "")
    reason = f"ep is {ep}: dp x tp = {dp} x {tp} ranks hold the experts whole"
    moe = spec.moe or MoeSectionSpec()
    if streams:
        refuse_moves(moe, f"{param}.moe")
    survives = moe.failover.enabled and dp > 1 and not streams
    return Layout(
        tp_size=tp,
        dp_size=dp,
        spreads_experts=True,
        num_redundant=_redundant(moe, ep, arch, f"{param}.moe"),
        max_moves=moe.balance.max_moves if moe.balance.enabled else 0,
        survives=survives,
        lost_groups=_lost_groups(moe, dp, f"{param}.moe.failover"),
        is_failover_open=survives and moe.failover.lost_groups == "auto",
        reason=reason if wanted == "auto" else "",
    )


def _redundant(moe: MoeSectionSpec, ep: int, arch: ArchConfig, param: str) -> int:
    """Copies per rank and layer."""
    wanted = moe.redundant_experts
    if isinstance(wanted, str):
        return 1 if moe.balance.enabled else 0
    most = max(layer.moe.gate.num_experts for layer in arch.layers if layer.moe)
    elsewhere = most - most // ep
    if wanted > elsewhere:
        raise ConfigError(
            f"redundant_experts is {wanted}, but other ranks hold only {elsewhere} experts.",
            f"Use at most {elsewhere}.",
            param=f"{param}.redundant_experts",
        )
    if moe.balance.enabled and wanted == 0:
        raise ConfigError(
            "balance is enabled with redundant_experts 0: no rank has room for an expert to move "
            "to.",
            "Set redundant_experts to 1 or more, or leave it out.",
            param=f"{param}.redundant_experts",
        )
    return wanted


def _lost_groups(moe: MoeSectionSpec, dp: int, param: str) -> int:
    """Groups that the file asks room for."""
    wanted = moe.failover.lost_groups
    if isinstance(wanted, str):
        return 0
    if wanted and not moe.failover.enabled:
        raise ConfigError(
            f"lost_groups is {wanted}, but failover is not enabled.",
            "Leave lost_groups out, or set enabled: true.",
            param=f"{param}.lost_groups",
        )
    if wanted >= dp:
        raise ConfigError(
            f"lost_groups is {wanted}, but there are {dp} data-parallel group(s): none would be "
            "left.",
            f"Use at most {dp - 1}." if dp > 1 else "Leave it out, or raise parallel.dp.",
            param=f"{param}.lost_groups",
        )
    return wanted


def _resolve_ep(spec: ModelSpec) -> int:
    parallel = spec.parallel
    if not isinstance(parallel.ep, str):
        return parallel.ep
    spreads = spec.engine == "expert_parallel" or parallel.dp > 1
    return parallel.dp * parallel.tp if spreads else 1


def _refuse_groups(spec: ModelSpec, param: str) -> None:
    """dp and ep have no meaning for an engine that was asked for by another name."""
    for key in ("dp", "ep"):
        value = getattr(spec.parallel, key)
        if value not in (1, "auto"):
            raise ConfigError(
                f"{key} is {value}, but engine is {spec.engine}, which has no expert-parallel "
                "ranks.",
                f"Set engine: expert_parallel, or leave {key} out.",
                param=f"{param}.parallel.{key}",
            )


def _refuse_dense(spec: ModelSpec, param: str) -> None:
    parallel = spec.parallel
    if parallel.dp > 1:
        raise ConfigError(
            f"dp is {parallel.dp}, but the model has no experts for data-parallel groups to share.",
            f"Use `replicas: {spec.replicas * parallel.dp}` for more copies of the model.",
            param=f"{param}.parallel.dp",
        )
    if parallel.ep not in (1, "auto"):
        raise ConfigError(
            f"ep is {parallel.ep}, but the model is dense: it has no experts.",
            "Leave ep out.",
            param=f"{param}.parallel.ep",
        )
    if spec.engine == "expert_parallel":
        raise ConfigError(
            "engine is expert_parallel, but the model is dense: it has no experts.",
            "Leave engine out.",
            param=f"{param}.engine",
        )


def _check_ep(spec: ModelSpec, ep: int, arch: ArchConfig, param: str) -> None:
    tp, dp = spec.parallel.tp, spec.parallel.dp
    ranks = dp * tp
    if ep == 1 and dp > 1:
        raise ConfigError(
            f"ep is 1 with dp {dp}: experts that are sliced over tp ranks cannot be shared by "
            "several groups.",
            f"Set ep to dp x tp = {ranks}, or leave it out.",
            param=f"{param}.parallel.ep",
        )
    if ep not in (1, ranks):
        raise ConfigError(
            f"ep is {ep}, but the replica has dp x tp = {dp} x {tp} = {ranks} ranks, and all of "
            "them share the experts.",
            f"Leave ep out, or raise dp or tp until dp x tp is {ep}.",
            param=f"{param}.parallel.ep",
        )
    if ep == 1 and spec.engine == "expert_parallel":
        raise ConfigError(
            f"engine is expert_parallel, but {ranks} rank(s) with ep {ep} share no experts.",
            "Set parallel.dp or parallel.tp to at least 2 and leave ep out.",
            param=f"{param}.engine",
        )
    most = max(layer.moe.gate.num_experts for layer in arch.layers if layer.moe)
    if ep > most:
        raise ConfigError(
            f"dp x tp = {dp} x {tp} = {ep} ranks, but no layer has more than {most} experts: "
            f"{ep - most} ranks would hold none.",
            f"Use at most {most} ranks.",
            param=f"{param}.parallel",
        )
    if ep > 1 and spec.device == "cuda" and (why := why_experts_on_cpus(spec)):
        raise ConfigError(
            f"device is cuda, but this expert-parallel replica runs on CPUs only: {why}.",
            f"Set device: cpu, or engine: expert_parallel with tp: 1 and dp: {ranks}.",
            param=f"{param}.device",
        )
