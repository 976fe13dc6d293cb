"""The plan: a cluster file with every `auto` decided. Frozen, sliced per component, never mutated.

`cluster/planner` makes it, `cluster/control` deploys it, and each process receives only its slice
as plain JSON (`to_json` / `from_json`). Every decision that was not the user's carries a reason.
Standard library only, so an engine on a bare machine can take a slice too.
"""

from __future__ import annotations

import dataclasses
import enum
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from cluster.base.front_plan import GatewayPlan
from cluster.base.zero3_plan import Zero3Plan

PlanT = TypeVar("PlanT")


class EngineKind(enum.StrEnum):
    """The kinds of engine replica."""

    TENSOR_PARALLEL = "tensor_parallel"
    OFFLOAD = "offload"
    EXPERT_PARALLEL = "expert_parallel"


@dataclass(frozen=True, slots=True, kw_only=True)
class KvPlan:
    """The paged KV cache of one replica; block counts are the same on all its ranks."""

    block_size: int
    num_blocks: int
    dtype: str
    bytes_per_rank: int
    prefix_caching: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeculationPlan:
    """How tokens are drafted from where the latest ones stood before."""

    num_tokens: int
    """Most drafted tokens of a request in a step."""
    min_ngram: int
    """Tokens that have to match."""
    max_ngram: int
    """Tokens that are compared to choose between matches."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerPlan:
    """Limits of one engine's scheduler."""

    max_running_requests: int
    max_step_tokens: int
    max_context: int
    max_waiting_requests: int
    step_timeout_s: float
    """A step without an answer for this long means a hung rank."""
    max_rank_restarts: int = 0
    """Times in an hour that lost ranks are replaced while requests wait."""
    speculation: SpeculationPlan | None = None
    """None: no tokens are drafted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """Predicted bytes of one rank."""

    weights_bytes: int
    kv_bytes: int
    workspace_bytes: int
    available_bytes: int
    shared_bytes: int = 0
    """Of the weights, what replicas on one node have in common: a node holds it once."""
    host_bytes: int = 0
    """Of host memory beside a device: weights at home there, and slots that others pass through;
    in an expert-parallel replica what rows pass through on their way to experts."""

    @property
    def total_bytes(self) -> int:
        """All that the rank will hold where it computes."""
        return self.weights_bytes + self.kv_bytes + self.workspace_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class OffloadPlan:
    """How each rank of an offload replica holds and streams its weights; bytes are per rank."""

    disk_path: str
    """Directory of the packed stores: one file for each rank of each model."""
    device_bytes: int
    """Bound on resident weights, ring, cache and workspace together; the host's on a CPU rank."""
    host_bytes: int
    """Bound on host memory beside the device: staging, `host_units` and a KV cache that is not at
    home on the device. A CPU rank has the cache alone there."""
    workspace_bytes: int
    resident_units: tuple[str, ...] = ()
    """Weight units that stay on the device."""
    share_resident: bool = False
    """Resident units are pages that all replicas of the node have in common (CPU ranks)."""
    num_sharing: int = 1
    """Data-parallel ranks that read every unit but their own routed experts together, a piece each,
    into memory that they share: its bytes count for each of them in equal parts."""
    host_units: tuple[str, ...] = ()
    """Weight units that stay in host memory and are copied from there; none on a CPU rank."""
    is_packed: bool = True
    """False: records are made from the checkpoint's files each time; there is no store."""
    held_bytes: int = 0
    """Most bytes of streamed compressed records that stay in memory as they are stored: the same
    share of each is not read again (CPU ranks)."""
    ring_slots: int = 3
    """Places for streamed units, each as large as the largest of them."""
    prefetch_depth: int = 3
    """Units being computed, loaded or waiting at one time; 1 loads and computes in turn."""
    expert_slots: int = 0
    """Places for routed experts that are not resident; the most useful ones stay there."""
    micro_batch_tokens: int = 0
    """Most rows that a layer computes at a time; 0: those of the step. A layer's weights are there
    once for all of a step's micro-batches."""
    kv_home: str = "device"
    """Whose budget holds the KV cache: `device`; `host`, and the host's cores attend to it; or
    `streamed`: the host's, and the blocks of a micro-batch pass through windows on the device."""
    kv_windows: int = 0
    """Micro-batches whose blocks of a layer are on the device at one time; 0 unless streamed."""
    kv_window_blocks: int = 0
    """Blocks of one window."""
    host_experts: HostExpertsPlan | None = None
    """Routed experts among `host_units` may be computed by the host's cores; None: never. Their
    results may differ from the device's in the last bits, so tokens then depend on the load."""
    precision: str = "native"
    """Number format of streamed linear weights: `native`, or a quantised one."""
    compression: str = "none"
    """How records lie on disk: `none`, or `lossless`: shorter, and the same bits after a read."""
    reader: str = "auto"
    """auto, aio, direct or buffered."""
    verify: str = "first"
    """Checksums: `first` (the first read of each record) or `always`."""
    read_timeout_s: float = 30.0
    """A record that is not there after this long is an error."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HostExpertsPlan:
    """What decides whether an expert in host memory is computed there or fetched."""

    link_bytes_per_s: float
    """Host memory to device."""
    host_bytes_per_s: float
    """What the host's cores read of their own memory."""
    host_flops_per_s: float
    """What they multiply."""
    call_s: float = 5e-5
    """For each expert, whatever its size: calls, waiting for rows, sending them back."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeedPoint:
    """One batch that an offload replica could run, and what is predicted of it."""

    rows: int
    """Requests that decode together."""
    tokens_per_s: float
    tpot_s: float
    resident_layers: int
    precision: str
    compression: str = "none"
    """How records lie on disk: `none` or `lossless`."""
    held_bytes: int = 0
    """Of streamed compressed records, what stays in memory as it is stored."""
    micro_batch_tokens: int
    """Most tokens that a layer computes at a time; 0: all of a step's."""
    kv_home: str
    """Where keys and values are: `device`, `host` or `streamed`."""
    bound: str
    """What the time is spent on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeedPlan:
    """What is predicted of an offload replica, from the measured speeds of its machine."""

    chosen: SpeedPoint
    ttft_s: float
    """An idle replica's first token after `prompt_tokens`."""
    prompt_tokens: int
    context_tokens: int
    """Mean tokens of a request that the prediction is for."""
    disk_bytes: int
    """Read from disk in every step."""
    stored_share: float = 1.0
    """What compression leaves of them; 1: there is none."""
    host_bytes: int
    """Copied from host memory in every step."""
    rates: dict[str, float]
    """Measured bytes per second: disk, link, memory, and decoding where records are compressed."""
    frontier: tuple[SpeedPoint, ...]
    """What nothing else beats in both tokens/s and time per token, fastest token first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertPlan:
    """How the ranks of an expert-parallel replica share the experts and reach them."""

    experts_per_rank: tuple[int, ...]
    """Routed experts that each rank holds whole, in the layer that has most."""
    exchange: str
    """auto (chosen per step), flat, hierarchical or preposted."""
    dispatch: str
    """How hidden states travel: exact, int8 or fp8."""
    combine: str
    """How partial sums travel back: fp32 or bf16."""
    probe_s: float = 1.0
    """What measuring the links may take, where `exchange` is auto."""
    capacity_factor: float | None = None
    """Bound on the rows a rank sends to one expert, over their mean; None: nothing is dropped."""
    num_redundant: int = 0
    """Copies of other ranks' experts that each rank holds in every layer, counted above."""
    balance_interval_s: float | None = None
    """Time between two looks at the load; None: experts stay where they are."""
    max_moves: int = 0
    """Experts that ranks fetch at a time."""
    survives: bool = False
    """Ranks that are left go on when others are lost, if they can hold all experts."""
    lost_groups: int = 0
    """Data-parallel groups whose loss memory is planned for: room for their experts elsewhere."""
    spare_slots: int = 0
    """Experts that each rank can take in for that, in the layer that needs most."""
    spare_bytes: int = 0
    """What is kept free on each rank for it, in all layers; part of its workspace."""
    rejoins: bool = True
    """Lost ranks are replaced while the others serve."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OverflowPlan:
    """Where a gateway sends generations that a model's replicas cannot take."""

    model: str
    """Name of another model of the plan, with the same checkpoint."""
    waiting: int
    """Requests waiting in every replica from which on new ones go over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelPlan:
    """One served model: what every one of its replicas is built from."""

    name: str
    path: str
    """Absolute local directory of the checkpoint (a repo id is resolved before planning ends)."""
    source: str
    """What the user wrote: a directory or a repo id."""
    family: str
    engine: EngineKind
    replicas: int
    tp_size: int
    device: str
    """cpu or cuda."""
    dtype: str
    num_threads: int
    """Compute threads per rank (CPU)."""
    cpus_per_rank: float
    gpus_per_rank: float
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    kv: KvPlan
    scheduler: SchedulerPlan
    memory: MemoryPlan
    reasons: dict[str, str] = field(default_factory=dict)
    """Field name -> why `auto` became what it is."""
    leader_cpus: float = 0.1
    """Logical CPUs that Ray reserves for each replica's leader."""
    nodes: tuple[str, ...] = ()
    """Host foreseen for each tensor-parallel group, replica by replica; Ray has the last word."""
    offload: OffloadPlan | None = None
    """Only with `engine` offload."""
    speed: SpeedPlan | None = None
    """Only with `engine` offload."""
    quantization: str = "none"
    """Number format of resident linear weights: none (`dtype`) or fp8."""
    kernels: str = "auto"
    """auto, native or torch; what `auto` becomes depends on the compiler of the rank's node."""
    attention_backend: str = "auto"
    """auto or a backend's name."""
    dp_size: int = 1
    """Data-parallel groups of each replica, each of `tp_size` ranks and with its own cache."""
    experts: ExpertPlan | None = None
    """Only with `engine` expert_parallel."""
    overflow: OverflowPlan | None = None
    tool_call_parser: str = "auto"
    """auto (as the chat template shows) or a format's name; only gateways look at it."""
    zero3: Zero3Plan | None = None
    """Only with `engine` offload and an architecture that transformers computes; then `offload`
    is None."""

    @property
    def num_ranks(self) -> int:
        """Ranks of one replica; with `experts`, they are the expert-parallel group."""
        return self.dp_size * self.tp_size


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterPlan:
    """Everything that will run."""

    name: str
    gateway: GatewayPlan
    models: tuple[ModelPlan, ...]
    dashboard_port: int
    warnings: tuple[str, ...] = ()
    drain_s: float = 30.0
    """Longest time that requests have to finish on a replica or gateway that is taken away."""


def to_json(plan: Any) -> dict[str, Any]:
    """A plan (or slice) as JSON-ready dicts, lists and scalars."""
    result: dict[str, Any] = dataclasses.asdict(plan)
    return result


def from_json(cls: type[PlanT], data: Mapping[str, Any]) -> PlanT:
    """Inverse of `to_json` for the plan dataclasses of this module.

    Raises:
        TypeError: a field is missing or unknown.
    """
    hints = typing.get_type_hints(cls)
    return cls(**{key: _revive(hints[key], value) for key, value in data.items()})


def _revive(hint: Any, value: Any) -> Any:
    origin = typing.get_origin(hint)
    if origin is tuple:
        (item, *_) = typing.get_args(hint)
        return tuple(_revive(item, entry) for entry in value)
    if origin in (typing.Union, types.UnionType):
        inner = next(arg for arg in typing.get_args(hint) if arg is not type(None))
        return None if value is None else _revive(inner, value)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return from_json(hint, value)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return hint(value)
    return value
