"""A model whose device and dtype are decided and whose cache is not: what each rank must hold.

Drafts are cheap to recompute, so a refusal can try other settings and recommend one that works.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from cluster.base.errors import ConfigError
from cluster.base.spec import ModelSpec
from cluster.base.zero3_plan import Zero3Plan
from cluster.planner.decisions import Decision, DeviceChoice
from cluster.planner.foreign_memory import foreign_workspace, longest_step_s
from cluster.planner.kernels import refuse_kernels
from cluster.planner.kv_sizing import KvDemand
from cluster.planner.layout import Layout
from cluster.planner.memory import StepShape, Workspace, workspace
from cluster.planner.sources import ModelSource
from cluster.planner.streaming_choice import Streaming
from replicas.models.memory import DTYPE_BYTES, kv_bytes_per_token, weight_bytes_per_rank

DEFAULT_STEP_TOKENS = 512
TIMEOUT_STEPS = 10
"""A step that takes so many times the prediction hangs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """One model between its first decisions and its plan."""

    source: ModelSource
    device: DeviceChoice
    dtype: Decision[str]
    layout: Layout
    max_step_tokens: int
    weights_bytes: int
    space: Workspace
    kv: KvDemand
    micro_batch_tokens: int = 0
    """Most tokens that a layer computes at a time; 0: all of a step's."""
    streaming: Streaming | None = None
    """Set when the weights are streamed; `weights_bytes` is then what stays on the device."""
    zero3: Zero3Plan | None = None
    """Set when DeepSpeed holds the weights; `weights_bytes` is then what it has in memory."""

    @property
    def fixed_bytes(self) -> int:
        """Bytes of one rank that are not up for decision: all but an automatic cache."""
        return self.weights_bytes + self.space.total_bytes + self.kv.fixed_bytes

    @property
    def shared_bytes(self) -> int:
        """Of one rank, what replicas of the model on a node have in common."""
        return self.streaming.shared_bytes if self.streaming else 0

    @property
    def booked_host_bytes(self) -> int:
        """Host memory of one rank on a device: what it is bounded by, or needs."""
        if not self.on_gpu:
            return 0
        return self.streaming.budgets.host_bytes if self.streaming else self.space.host_bytes

    @property
    def planned_host_bytes(self) -> int:
        """The same, as far as it is expected to be used."""
        if self.streaming is None or not self.on_gpu:
            return self.booked_host_bytes
        return self.streaming.found.best.host_bytes

    @property
    def moves_weights(self) -> bool:
        """Whether every step passes weights through a window."""
        return self.streaming is not None or self.zero3 is not None

    @property
    def tp_size(self) -> int:
        """Ranks of one tensor-parallel group."""
        return self.layout.tp_size

    @property
    def on_gpu(self) -> bool:
        """Whether ranks hold their memory on devices."""
        return self.device.device == "cuda"

    @property
    def step_timeout_s(self) -> float:
        """The user's, or more where even the predicted step would come near it."""
        asked = self.source.spec.limits.step_timeout
        if self.zero3 is not None:
            return max(asked, longest_step_s(self.zero3.model, self.dtype.value))
        if self.streaming is None:
            return asked
        found = self.streaming.found
        return max(asked, math.ceil(TIMEOUT_STEPS * max(found.best.tpot_s, found.ttft_s)))

    def parts(self) -> dict[str, int]:
        """The fixed bytes of one rank by name, for reasons and errors."""
        parts = {
            "resident weights and ring" if self.streaming else "weights": self.weights_bytes,
            "workspace": self.space.total_bytes - self.space.process_bytes,
            "process": self.space.process_bytes,
        }
        if self.space.spare_bytes:
            parts["workspace"] -= self.space.spare_bytes
            parts["moe.failover"] = self.space.spare_bytes
        return {**parts, "kv_cache.memory": self.kv.fixed_bytes} if self.kv.fixed_bytes else parts


def draft_model(source: ModelSource, device: DeviceChoice, dtype: Decision[str]) -> Draft:
    """The draft of a model as its entry asks for it."""
    spec = source.spec
    _refuse_idle_quantization(source, device)
    refuse_kernels(source, device, dtype)
    return _draft(source, device, dtype, source.layout, step_tokens(spec))


def _refuse_idle_quantization(source: ModelSource, device: DeviceChoice) -> None:
    """Where `quantization` would change nothing."""
    spec = source.spec
    if spec.quantization == "none":
        return
    why = ""
    if spec.engine == "offload":
        why = "the weights are streamed: their format is offload.precision"
    elif device.device != "cuda":
        why = f"the ranks run on {device.device}, and fp8 products are made on cuda"
    elif source.arch.has_experts:
        why = "experts are not served in fp8"
    if why:
        raise ConfigError(
            f"quantization: {spec.quantization} has no effect: {why}.",
            "Leave quantization out.",
            param=source.param("quantization"),
        )


def step_tokens(spec: ModelSpec) -> int:
    """Tokens of a step where nothing but the user decides."""
    wanted = spec.limits.max_step_tokens
    return DEFAULT_STEP_TOKENS if isinstance(wanted, str) else wanted


def weight_bytes(source: ModelSource, layout: Layout, dtype: str) -> int:
    """Bytes of the first rank's weights: where experts do not divide, it holds one more."""
    if source.foreign is not None:
        return source.foreign.num_values * DTYPE_BYTES[dtype]
    held, fp8 = layout.held_by(source.arch, 0), source.spec.quantization == "fp8"
    return weight_bytes_per_rank(source.arch, layout.tp_size, dtype, held, fp8=fp8)


def redraft(  # noqa: PLR0913 - what may be changed is named one by one
    draft: Draft,
    *,
    dtype: str | None = None,
    tp_size: int | None = None,
    max_step_tokens: int | None = None,
    micro_batch_tokens: int | None = None,
    lost_groups: int | None = None,
    kv_memory: int | None = None,
) -> Draft:
    """The same model with other settings."""
    changed = _draft(
        draft.source,
        draft.device,
        Decision(value=dtype) if dtype else draft.dtype,
        replace(
            draft.layout,
            tp_size=tp_size or draft.tp_size,
            lost_groups=draft.layout.lost_groups if lost_groups is None else lost_groups,
        ),
        max_step_tokens or draft.max_step_tokens,
        draft.micro_batch_tokens if micro_batch_tokens is None else micro_batch_tokens,
    )
    if kv_memory is None:
        return changed
    return replace(changed, kv=replace(changed.kv, memory=kv_memory))


def _draft(
    source: ModelSource,
    device: DeviceChoice,
    dtype: Decision[str],
    layout: Layout,
    max_step_tokens: int,
    micro_batch_tokens: int = 0,
) -> Draft:
    spec, arch, tp_size, foreign = source.spec, source.arch, layout.tp_size, source.foreign
    asked = spec.limits.max_context
    max_running_requests = min(spec.limits.max_running_requests, max_step_tokens)
    step = StepShape(
        max_step_tokens=max_step_tokens,
        max_running_requests=max_running_requests,
        max_context=arch.max_position if isinstance(asked, str) else asked,
        tp_size=tp_size,
        dtype=dtype.value,
        device=device.device,
        ep_size=layout.num_ranks if layout.spreads_experts else 1,
        max_moves=layout.max_moves,
        micro_batch_tokens=micro_batch_tokens,
    )
    kv = KvDemand(
        param=f"models[{source.index}]",
        token_bytes=foreign.kv_values_per_token * DTYPE_BYTES[dtype.value]
        if foreign
        else kv_bytes_per_token(arch, tp_size, dtype.value),
        block_size=spec.kv_cache.block_size,
        memory=spec.kv_cache.memory,
        max_context=asked,
        max_position=arch.max_position,
        max_running_requests=max_running_requests,
    )
    space = foreign_workspace(foreign, step) if foreign else workspace(arch, step)
    return Draft(
        source=source,
        device=device,
        dtype=dtype,
        layout=layout,
        max_step_tokens=max_step_tokens,
        micro_batch_tokens=micro_batch_tokens,
        weights_bytes=weight_bytes(source, layout, dtype.value),
        space=replace(space, spare_bytes=layout.spare_bytes(arch, dtype.value)),
        kv=kv,
    )
