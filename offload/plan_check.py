"""Whether the parts of an offload plan go together, and with the rank that is to carry it out."""

from __future__ import annotations

from cluster.base.errors import ConfigError, InternalError
from cluster.base.plan import OffloadPlan
from offload.compression import Compression
from offload.homes import KvHome
from offload.precision import Precision
from offload.quant_kernels import QuantKernels
from offload.record_check import VERIFY
from replicas.worker.assembly import WeightsRequest


def check_plan(plan: OffloadPlan, request: WeightsRequest, *, has_stages: bool) -> None:
    """Return when the plan can be carried out for such a rank.

    Args:
        has_stages: records pass through host memory on their way to a device.

    Raises:
        ConfigError: it asks for what does not go together, or not on this device.
        InternalError: the model was not made for it.
    """
    if plan.verify not in VERIFY:
        raise ConfigError(
            f"verify {plan.verify!r} is not known.", f"Use {' or '.join(VERIFY)}.", param="verify"
        )
    if plan.precision not in list(Precision):
        raise ConfigError(
            f"precision {plan.precision!r} is not known.",
            f"Use {', '.join(Precision)}.",
            param="precision",
        )
    if not plan.is_packed and (plan.share_resident or _changes_records(plan)):
        raise ConfigError(
            "Weights straight from a checkpoint are neither shared nor quantised nor compressed.",
            "Pack them.",
            param="pack",
        )
    if plan.compression != Compression.NONE and plan.share_resident:
        raise ConfigError(
            "Pages of compressed records cannot be computed with, so they cannot be shared.",
            "Set compression to none, or share_resident to never.",
            param="share_resident",
        )
    _check_held(plan, has_stages=has_stages)
    _check_kv(plan, request)
    adapted = isinstance(request.model.kernels, QuantKernels)
    if adapted != (plan.precision != Precision.NATIVE):
        raise InternalError(f"The model's kernels do not know {plan.precision} weights.")
    if plan.share_resident and request.device.type != "cpu":
        raise ConfigError(
            "Ranks on devices have no resident units in host memory to share.",
            "Set share_resident to never.",
            param="share_resident",
        )
    if plan.host_units and not has_stages:
        raise ConfigError(
            "A CPU rank has one memory: units cannot stay in the host's.",
            "Make them resident.",
            param="host_units",
        )
    if plan.host_experts is not None and not plan.host_units:
        raise ConfigError(
            "No experts lie in host memory that could be computed there.",
            "Leave host_experts out.",
            param="host_experts",
        )


def _check_held(plan: OffloadPlan, *, has_stages: bool) -> None:
    if not plan.held_bytes:
        return
    why = ""
    if plan.compression == Compression.NONE:
        why = "records that are not compressed are as short as what they are for"
    elif has_stages:
        why = "the ring is on a device, where records are not decoded"
    elif plan.num_sharing > 1:
        why = "ranks that read together keep whole layers"
    if why:
        raise ConfigError(
            f"{plan.held_bytes} bytes of records are to stay as they are stored, and {why}.",
            "Keep whole units in memory instead.",
            param="held_bytes",
        )


def _changes_records(plan: OffloadPlan) -> bool:
    return plan.precision != Precision.NATIVE or plan.compression != Compression.NONE


def _check_kv(plan: OffloadPlan, request: WeightsRequest) -> None:
    if plan.kv_home not in list(KvHome):
        known = ", ".join(KvHome)
        raise ConfigError(
            f"kv_home {plan.kv_home!r} is not known.", f"Use {known}.", param="kv_home"
        )
    if plan.kv_home != KvHome.DEVICE and request.device.type != "cpu":
        raise ConfigError(
            "Ranks on devices have their KV cache there in this version.",
            "Set kv_home to device.",
            param="kv_home",
        )
    longest = -(-request.spec.max_context // request.spec.block_size)
    if plan.kv_home == KvHome.STREAMED and (plan.kv_windows < 1 or plan.kv_window_blocks < longest):
        raise ConfigError(
            f"{plan.kv_windows} windows of {plan.kv_window_blocks} blocks do not hold a request "
            f"of {longest} blocks.",
            "Plan the model again.",
            param="kv_home",
        )
