"""A plan as tables of text: what runs where, what it takes, and why. Pure; knows no terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from cluster.base import names
from cluster.base.amount_text import duration_text, size_text
from cluster.base.plan import ClusterPlan, ExpertPlan, ModelPlan, SpeculationPlan
from cluster.planner.explain_streaming import frontier_tables, streaming_tables, zero3_tables
from cluster.planner.table import Table


def explain(plan: ClusterPlan) -> tuple[Table, ...]:
    """What will run: models, memory of each rank by part, foreseen places, the front."""
    experts = (_experts(plan),) if any(model.experts for model in plan.models) else ()
    return (
        _models(plan),
        *experts,
        _memory(plan),
        *streaming_tables(plan),
        *zero3_tables(plan),
        _places(plan),
        _front(plan),
    )


def explain_reasons(plan: ClusterPlan) -> tuple[Table, ...]:
    """Why: every decision that was not the user's, batches to choose from, limits in force."""
    reasons = tuple(row for model in plan.models for row in _reasons(model))
    return (
        Table(title="Decisions", columns=("MODEL", "SETTING", "VALUE", "WHY"), rows=reasons),
        *frontier_tables(plan),
        _limits(plan),
    )


def _models(plan: ClusterPlan) -> Table:
    return Table(
        title="Models",
        columns=("MODEL", "FAMILY", "ENGINE", "REPLICAS", "TP", "DEVICE", "DTYPE", "CONTEXT"),
        rows=tuple(
            (
                model.name,
                model.family,
                model.engine.value,
                str(model.replicas),
                str(model.tp_size),
                model.device,
                model.dtype,
                str(model.scheduler.max_context),
            )
            for model in plan.models
        ),
    )


def _experts(plan: ClusterPlan) -> Table:
    rows = []
    for model in plan.models:
        if model.experts is None:
            continue
        counts = Counter(model.experts.experts_per_rank)
        held = " + ".join(
            f"{ranks} x {count}" if ranks > 1 else f"{count}" for count, ranks in counts.items()
        )
        ranks = f"{model.dp_size} x {model.tp_size} = {model.num_ranks}"
        wire = f"{model.experts.dispatch}, {model.experts.combine} back"
        survives = _survives(model.experts)
        rows.append((model.name, ranks, held, model.experts.exchange, wire, survives))
    return Table(
        title="Expert parallelism of each replica",
        columns=(
            "MODEL",
            "DP x TP = RANKS",
            "MOST EXPERTS PER LAYER",
            "EXCHANGE",
            "ROWS TRAVEL",
            "SURVIVES",
        ),
        rows=tuple(rows),
    )


def _survives(experts: ExpertPlan) -> str:
    """Of how many groups the loss, and the room that is kept for it."""
    if not experts.survives:
        return "no loss"
    if not experts.lost_groups:
        return "what copies cover"
    groups = f"{experts.lost_groups} group" + ("s" if experts.lost_groups > 1 else "")
    return f"{groups}: {size_text(experts.spare_bytes)} for {experts.spare_slots} more"


def _memory(plan: ClusterPlan) -> Table:
    return Table(
        title="Memory of each rank",
        columns=("MODEL", "WEIGHTS", "KV CACHE", "WORKSPACE", "TOTAL", "AVAILABLE"),
        rows=tuple(
            (
                model.name,
                _weights_text(model),
                f"{size_text(model.memory.kv_bytes)} ({model.kv.num_blocks} blocks)",
                _workspace_text(model),
                size_text(model.memory.total_bytes),
                size_text(model.memory.available_bytes),
            )
            for model in plan.models
        ),
    )


def _weights_text(model: ModelPlan) -> str:
    text = size_text(model.memory.weights_bytes)
    shared = model.memory.shared_bytes
    return f"{text} ({size_text(shared)} of it once per node)" if shared else text


def _workspace_text(model: ModelPlan) -> str:
    """With what rows of devices pass through in the host; streamed weights have a table."""
    text = size_text(model.memory.workspace_bytes)
    host = model.memory.host_bytes
    return f"{text} ({size_text(host)} of the host beside)" if model.experts and host else text


def _places(plan: ClusterPlan) -> Table:
    rows = []
    for model in plan.models:
        for host, count in Counter(model.nodes).items():
            ranks = count * model.tp_size
            each = f"{model.gpus_per_rank:g} GPU, " if model.gpus_per_rank else ""
            each += f"{model.num_threads} thr, {model.cpus_per_rank:g} CPU"
            shown = str(count) if model.dp_size == 1 else f"{count / model.dp_size:g}"
            rows.append((model.name, host, shown, str(ranks), each))
    return Table(
        title="Foreseen places",
        columns=("MODEL", "NODE", "REPLICAS", "RANKS", "EACH RANK"),
        rows=tuple(rows),
    )


def _front(plan: ClusterPlan) -> Table:
    gateway = plan.gateway
    return Table(
        title="Front",
        columns=("GRPC", "HTTP", "GATEWAYS", "DASHBOARD"),
        rows=(
            (
                names.authority(gateway.host, gateway.grpc_port),
                f"http://{names.authority(gateway.host, gateway.http_port)}/v1",
                str(gateway.replicas),
                f"http://127.0.0.1:{plan.dashboard_port}",
            ),
        ),
    )


def _reasons(model: ModelPlan) -> Iterator[tuple[str, str, str, str]]:
    for setting, reason in model.reasons.items():
        value: object = model
        for part in setting.split("."):
            value = getattr(value, part)
        if isinstance(value, int) and setting.endswith("_bytes"):
            value = size_text(value)
        yield model.name, setting, _value_text(value), reason


def _value_text(value: object) -> str:
    if isinstance(value, SpeculationPlan):
        return f"ngram of {value.min_ngram}-{value.max_ngram}, up to {value.num_tokens} tokens"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _limits(plan: ClusterPlan) -> Table:
    limits = plan.gateway.limits
    gateway = (
        ("active requests", str(limits.max_active_requests)),
        ("waiting prompt tokens", str(limits.max_prompt_tokens_waiting)),
        ("message size", size_text(limits.max_message_bytes)),
        ("default timeout", duration_text(limits.default_timeout_s)),
        ("resumes of a request", str(limits.max_resumes)),
    )
    rows = [("each gateway", *row) for row in gateway]
    for model in plan.models:
        scheduler = model.scheduler
        rows += [
            (model.name, "running requests", str(scheduler.max_running_requests)),
            (model.name, "waiting requests", str(scheduler.max_waiting_requests)),
            (model.name, "tokens per step", str(scheduler.max_step_tokens)),
            (model.name, "speculation", _value_text(scheduler.speculation or "none")),
            (model.name, "step timeout", duration_text(scheduler.step_timeout_s)),
            (model.name, "kernels", model.kernels),
            (model.name, "attention backend", model.attention_backend),
        ]
    return Table(title="Limits", columns=("WHERE", "LIMIT", "VALUE"), rows=tuple(rows))
