"""`models[].moe` of the cluster file: how ranks share experts, follow the load, survive losses."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from cluster.base.quantities import Duration, Real, Whole
from cluster.base.rules import Choice, Flag
from cluster.base.section import Auto, Section


class ExpertBalanceSpec(Section):
    """Moving experts between ranks while a replica serves, as the load drifts."""

    enabled: Annotated[bool, Flag()] = Field(
        default=False, description="Whether experts follow the load."
    )
    interval: Annotated[float, Duration(1, 24 * 3600)] = Field(
        default=60.0, description="Time between two looks at the load."
    )
    max_moves: Annotated[int, Whole(1, 1024)] = Field(
        default=8,
        description="Experts that ranks fetch at a time, over all layers. A rank's memory is "
        "planned for all of them at once.",
    )


class FailoverSpec(Section):
    """Going on with the ranks that are left when some of a replica's are lost."""

    enabled: Annotated[bool, Flag()] = Field(
        default=True,
        description="Whether the other data-parallel groups go on, with the requests of all, when "
        "a rank dies or stops. If they cannot hold all experts the whole replica restarts "
        "instead, see `limits.max_rank_restarts`.",
    )
    lost_groups: Annotated[int | Auto, Whole(0, 255, auto=True)] = Field(
        default="auto",
        description="Data-parallel groups that may be lost at a time: every rank keeps memory for "
        "its part of their experts, unless redundant copies cover them. auto: 1 where the memory "
        "holds twice that, else 0.",
    )
    rejoin: Annotated[bool, Flag()] = Field(
        default=True, description="Whether lost ranks are replaced while the others serve."
    )


class MoeSectionSpec(Section):
    """How the ranks of an expert-parallel replica exchange tokens."""

    exchange: Annotated[
        Literal["auto", "flat", "hierarchical", "preposted"],
        Choice(("auto", "flat", "hierarchical", "preposted")),
    ] = Field(
        default="auto",
        description="How tokens travel to their experts. flat: straight to each rank; "
        "hierarchical: once to each node, then on to its ranks; preposted: into receives posted "
        "one exchange ahead, which saves a delay for small steps. auto: the fastest for the size "
        "of each step, from the cost of the links as measured at start.",
    )
    probe_budget: Annotated[float, Duration(0.1, 60)] = Field(
        default=1.0,
        description="What measuring the links may take, at start and where ranks gather anew on "
        "other nodes: what does not fit is not timed. Refused without `exchange: auto`. "
        "More helps where many ranks share a core.",
    )
    dispatch: Annotated[Literal["exact", "int8", "fp8"], Choice(("exact", "int8", "fp8"))] = Field(
        default="exact",
        description="Number format of hidden states on their way to experts of other ranks; "
        "int8 and fp8 (one scale a row) change answers slightly.",
    )
    combine: Annotated[Literal["fp32", "bf16"], Choice(("fp32", "bf16"))] = Field(
        default="fp32",
        description="Number format of experts' sums on their way back; bf16 changes answers "
        "slightly.",
    )
    redundant_experts: Annotated[int | Auto, Whole(0, 1024, auto=True)] = Field(
        default="auto",
        description="Copies of other ranks' experts that each rank holds, in every layer. "
        "auto: 1 with `balance`, which needs room to move, else 0.",
    )
    balance: ExpertBalanceSpec = Field(
        default=ExpertBalanceSpec(), description="Moving experts as the load drifts."
    )
    failover: FailoverSpec = Field(
        default=FailoverSpec(), description="Going on without ranks that are lost."
    )
    capacity_factor: Annotated[float | None, Real(0.01, 1024)] = Field(
        default=None,
        description="Most rows a rank sends to one expert in a step, as a multiple of the mean. "
        "Rows beyond it, those with the least gate weight first, skip that expert and are counted: "
        "answers then depend on what else runs. Default: no limit, nothing is dropped.",
    )
