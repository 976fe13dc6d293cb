"""What a plan says about itself: why its values are what they are, and what to beware of. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from cluster.base.amount_text import size_text
from cluster.base.front_spec import GatewaySpec
from cluster.base.plan import ModelPlan
from cluster.base.spec import ClusterSpec
from cluster.planner.caches import Cache
from cluster.planner.cpus import Compute
from cluster.planner.drafts import TIMEOUT_STEPS, Draft
from cluster.planner.front import is_loopback
from cluster.planner.kernels import kernel_reasons
from cluster.planner.overflow import overflow_warnings
from cluster.planner.packing import NodeLoad
from cluster.planner.placement import Placed
from cluster.planner.zero3 import zero3_reason
from replicas.models.hf_encoding import encoding_from_hf


def reasons_of(draft: Draft, compute: Compute, cache: Cache) -> dict[str, str]:
    """Why each setting of a model's plan is what it is, where that was not the user's choice."""
    reasons = {
        "engine": _engine_reason(draft),
        **_step_reasons(draft),
        "experts.lost_groups": _failover_reason(draft),
        "experts.exchange": _exchange_reason(draft),
        "device": draft.device.reason,
        "dtype": draft.dtype.reason,
        "offload.compression": _compression_reason(draft),
        "memory.weights_bytes": _decoding_reason(draft),
        "num_threads": compute.threads.reason,
        "cpus_per_rank": compute.cpus.reason,
        **({} if draft.zero3 else kernel_reasons(draft.source, draft.device)),
        "kv.num_blocks": cache.size.num_blocks.reason,
        "scheduler.max_context": cache.size.max_context.reason,
    }
    return {key: reason for key, reason in reasons.items() if reason}


def _engine_reason(draft: Draft) -> str:
    if draft.zero3 is not None:
        return zero3_reason(draft)
    return draft.layout.reason if draft.streaming is None else draft.streaming.reason()


def _compression_reason(draft: Draft) -> str:
    """Why records of a streamed model are compressed or not, where the file left it open."""
    asked = draft.source.spec.offload
    if draft.streaming is None or (asked is not None and asked.compression != "auto"):
        return ""
    return draft.streaming.compression_reason()


def _failover_reason(draft: Draft) -> str:
    """Why there is room, or none, for experts of a lost group where the file left it open."""
    if not draft.layout.is_failover_open:
        return ""
    if draft.layout.lost_groups:
        return f"{size_text(draft.space.spare_bytes)} per rank fit twice beside the weights"
    return "the memory does not hold twice the experts that each rank would take in"


def _exchange_reason(draft: Draft) -> str:
    """How rows get from one device to another, and what that rules out."""
    if not (draft.layout.spreads_experts and draft.on_gpu):
        return ""
    return (
        "rows of devices pass through pinned host memory, where the host waits for them twice a "
        "layer; no step with an exchange is captured as a graph"
    )


def _decoding_reason(draft: Draft) -> str:
    """Why the weights take more memory than the files of the checkpoint."""
    checkpoint = draft.source.checkpoint
    encoding = encoding_from_hf(checkpoint.config)
    if encoding is None:
        return ""
    stored = size_text(checkpoint.weight_bytes)
    kept = "packed" if draft.streaming is not None else f"held in {draft.dtype.value}"
    return f"{stored} stored in all; {encoding.title} weights are decoded while loading and {kept}"


def _step_reasons(draft: Draft) -> dict[str, str]:
    """Why a streamed model's steps have their size, their deadline and drafts in them."""
    if not draft.moves_weights:
        return {}
    spec = draft.source.spec
    size = "the largest step that the transfer of the weights hides, or that memory allows"
    deadline = f"{TIMEOUT_STEPS} times the predicted longest step"
    if draft.zero3 is not None:
        size, deadline = "the largest step that memory allows", "all weights from a slow disk"
    return {
        "scheduler.max_step_tokens": size if spec.limits.max_step_tokens == "auto" else "",
        "scheduler.step_timeout_s": (
            deadline if draft.step_timeout_s > spec.limits.step_timeout else ""
        ),
        "scheduler.speculation": (
            "a streamed step costs the same with a few tokens more"
            if spec.speculation is None
            else ""
        ),
    }


def warnings_of(
    spec: ClusterSpec,
    models: Sequence[ModelPlan],
    placed: Sequence[Placed],
    loads: Sequence[NodeLoad],
) -> Iterator[str]:
    """What the user should know before it starts."""
    yield from _access_warnings(spec.gateway)
    for load in loads:
        if len(load.cpu_models) > load.cores:
            yield f"{len(load.cpu_models)} CPU ranks share {load.cores} cores on {load.host}."
    for model, where in zip(models, placed, strict=True):
        wanted = where.draft.source.spec.limits.max_running_requests
        if model.scheduler.max_running_requests < wanted:
            yield (
                f"{model.name}: max_running_requests {wanted} is lowered to "
                f"{model.scheduler.max_running_requests}: a step has only that many tokens."
            )
        yield from _streaming_warnings(model, where.draft)
        yield from overflow_warnings(model, models)
        if not model.eos_token_ids:
            yield f"{model.name}: the checkpoint names no end-of-text token; outputs end at length."


def _access_warnings(gateway: GatewaySpec) -> Iterator[str]:
    if is_loopback(gateway.host):
        return
    if gateway.api_keys_file is None and (gateway.tls is None or gateway.tls.client_ca is None):
        yield (
            f"gateway.host {gateway.host}: everybody who can reach this address can use the "
            "cluster; set gateway.api_keys_file."
        )
    elif gateway.tls is None:
        yield (
            f"gateway.host {gateway.host}: API keys cross the network in plain text; "
            "set gateway.tls, unless something in front of it speaks TLS."
        )


def _streaming_warnings(model: ModelPlan, draft: Draft) -> Iterator[str]:
    streaming, spec = draft.streaming, draft.source.spec
    if draft.zero3 is not None:
        yield f"{model.name}: {zero3_reason(draft)}."
        return
    if streaming is None:
        if spec.offload is not None:
            yield f"{model.name}: the model fits, so the `offload` section has no effect."
        return
    if streaming.fits:
        whole = "expert_parallel" if draft.layout.spreads_experts else "tensor_parallel"
        yield (
            f"{model.name}: engine offload is asked for although the model fits; predicted "
            f"{streaming.found.best.tokens_per_s:.3g} tokens/s, and "
            f"{streaming.resident_tokens_per_s:.3g} with engine: {whole}."
        )
    elif streaming.why:
        yield f"{model.name}: served by an offload replica: {streaming.reason()}."
