"""The choices behind `auto`: each function decides one thing and says why. Pure arithmetic."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from cluster.base.amount_text import size_text
from cluster.base.errors import ConfigError
from cluster.base.spec import ModelSpec
from cluster.dist.topology import Topology

ValueT = TypeVar("ValueT")

FRONT_CPUS = 0.1
"""Logical CPUs reserved for a gateway or a leader where the node has enough."""
MAX_FRONT_SHARE = 0.2
"""Gateways and leaders together reserve no more of a node than this."""
COMFORTABLE_SHARE = 0.4
"""float32 is chosen on the CPU when all models' weights take no more of the memory than this."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision(Generic[ValueT]):
    """A value, and why it is not the user's; `reason` is empty when it is."""

    value: ValueT
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceChoice:
    """Where a model's ranks run; `nodes` is set for GPUs: the node index of each tensor-parallel
    group, replica by replica."""

    device: str
    reason: str
    nodes: tuple[int, ...] = ()


def choose_devices(
    models: Sequence[ModelSpec], topology: Topology, on_cpus: Mapping[int, str] | None = None
) -> list[DeviceChoice]:
    """A device per model: those that insist on cuda first, then the others in their order.

    Args:
        on_cpus: models whose ranks run on CPUs only, and why.

    Raises:
        ConfigError: a model insists on cuda and there are not enough GPUs.
    """
    free = [len(node.devices) for node in topology.nodes]
    total = sum(free)
    choices: dict[int, DeviceChoice] = {}
    for index, model in sorted(enumerate(models), key=lambda item: item[1].device != "cuda"):
        need = f"{_replicas_text(model)} needs {_num_gpus(model)} GPUs"
        have = f"the cluster has {total}, {sum(free)} not taken by other models"
        bound = (on_cpus or {}).get(index, "")
        nodes = None if model.device == "cpu" or bound else _take_gpus(free, model)
        if nodes is not None:
            reason = f"{need}; {have}" if model.device == "auto" else ""
            if model.device == "auto":
                reason = f"{need} and there are enough ({total})"
            choices[index] = DeviceChoice(device="cuda", reason=reason, nodes=nodes)
        elif model.device == "cuda":
            raise ConfigError(
                f"{need}, each {'group' if model.parallel.dp > 1 else 'replica'}'s on one node; "
                f"{have}.",
                f"Lower `replicas` or `parallel.{'dp' if model.parallel.dp > 1 else 'tp'}`, or set "
                "`device: cpu`.",
                param=f"models[{index}].device",
            )
        else:
            why = "no GPU was found" if not total else f"{need}; {have}"
            choices[index] = DeviceChoice(
                device="cpu", reason=(bound or why) if model.device == "auto" else ""
            )
    return [choices[index] for index in range(len(models))]


def why_experts_on_cpus(spec: ModelSpec) -> str:
    """Why the ranks of an expert-parallel replica run on CPUs only; empty where they need not."""
    if spec.engine == "offload":
        return "groups that stream weights read them together into the host's memory"
    if spec.parallel.tp > 1:
        return "tensor-parallel ranks on GPUs meet in NCCL, where none can leave a lost peer"
    return ""


def _take_gpus(free: list[int], model: ModelSpec) -> tuple[int, ...] | None:
    """Node of each tensor-parallel group, taken from `free`; None, and nothing taken, when they do
    not fit. Groups of a replica fill a node before they begin another."""
    left, nodes = list(free), []
    for _ in range(model.replicas):
        node = -1
        for _ in range(model.parallel.dp):
            if node < 0 or left[node] < model.parallel.tp:
                node = max(range(len(left)), key=lambda index: left[index], default=-1)
            if node < 0 or left[node] < model.parallel.tp:
                return None
            left[node] -= model.parallel.tp
            nodes.append(node)
    free[:] = left
    return tuple(nodes)


def _num_gpus(model: ModelSpec) -> int:
    return model.replicas * model.parallel.dp * model.parallel.tp


def _replicas_text(model: ModelSpec) -> str:
    word = "replica" if model.replicas == 1 else "replicas"
    groups = f"dp={model.parallel.dp} x " if model.parallel.dp > 1 else ""
    return f"{model.replicas} {word} of {groups}tp={model.parallel.tp}"


def choose_dtype(
    wanted: str, checkpoint_dtype: str, device: str, float32_bytes: int, room_bytes: int
) -> Decision[str]:
    """The number format of weights and cache.

    Args:
        float32_bytes: weights of all the model's ranks, were they float32.
        room_bytes: this model's share of the memory that may be planned with (CPU only).
    """
    if wanted != "auto":
        return Decision(value=wanted)
    if device == "cuda":
        return Decision(value=checkpoint_dtype, reason="the checkpoint's own dtype")
    comfortable = int(room_bytes * COMFORTABLE_SHARE)
    needs = f"float32 weights take {size_text(float32_bytes)}"
    if float32_bytes <= comfortable:
        why = f"{needs} of {size_text(room_bytes)}; on the CPU float32 answers are exact"
        return Decision(value="float32", reason=f"{why} whatever else is in the batch")
    return Decision(
        value=checkpoint_dtype,
        reason=f"{needs}, more than {COMFORTABLE_SHARE:.0%} of {size_text(room_bytes)}: "
        "the checkpoint's own dtype",
    )


def choose_threads(wanted: int | str, cores: int, num_ranks: int) -> Decision[int]:
    """Compute threads of a CPU rank on a node with `num_ranks` ranks of all models."""
    if isinstance(wanted, int):
        return Decision(value=wanted)
    return Decision(
        value=max(1, cores // num_ranks),
        reason=f"{cores} cores for {num_ranks} {'rank' if num_ranks == 1 else 'ranks'}",
    )


def front_cpus(cores: int, num_front: int) -> float:
    """Logical CPUs for each of a node's gateways and leaders."""
    return floor_cpus(min(FRONT_CPUS, MAX_FRONT_SHARE * cores / max(1, num_front)))


def floor_cpus(cpus: float) -> float:
    """Rounded down to what Ray can tell apart."""
    return math.floor(cpus * 1000 + 1e-6) / 1000
