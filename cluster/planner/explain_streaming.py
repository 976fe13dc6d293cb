"""Streamed models as tables: where their weights are, how fast that is, and what else could be."""

from __future__ import annotations

from cluster.base.amount_text import size_text
from cluster.base.plan import ClusterPlan, ModelPlan, OffloadPlan, SpeedPlan
from cluster.planner.table import Table


def streaming_tables(plan: ClusterPlan) -> tuple[Table, ...]:
    """Tiers and predicted speed; nothing when no model is streamed."""
    streamed = [
        (model, model.offload, model.speed)
        for model in plan.models
        if model.offload and model.speed
    ]
    if not streamed:
        return ()
    return (
        Table(
            title="Where the weights of streamed models are",
            columns=(
                "MODEL",
                "ON DEVICE",
                "RING",
                "ON HOST",
                "HOST EACH STEP",
                "DISK EACH STEP",
                "FORMAT",
            ),
            rows=tuple(_homes(*entry) for entry in streamed),
        ),
        Table(
            title="How streamed models compute",
            columns=("MODEL", "EACH LAYER", "STEP", "KEYS AND VALUES"),
            rows=tuple(_computing(model, offload) for model, offload, _ in streamed),
        ),
        Table(
            title="Predicted speed of streamed models",
            columns=(
                "MODEL",
                "REQUESTS",
                "TOKENS/S",
                "PER TOKEN",
                "FIRST TOKEN",
                "BOUND BY",
                "SPEEDS",
            ),
            rows=tuple(_speed(model, speed) for model, _, speed in streamed),
        ),
    )


def zero3_tables(plan: ClusterPlan) -> tuple[Table, ...]:
    """Models that transformers computes; nothing when there is none."""
    held = [(model.name, model.zero3) for model in plan.models if model.zero3]
    if not held:
        return ()
    return (
        Table(
            title="Models that transformers computes under ZeRO-3",
            columns=("MODEL", "CLASS", "PARAMETERS", "WEIGHTS", "WINDOW", "READ BUFFERS"),
            rows=tuple(
                (
                    name,
                    zero3.model.architecture,
                    f"{zero3.model.num_values / 1e6:.4g} M",
                    "in memory" if zero3.tier == "memory" else f"on disk: {zero3.disk_path}",
                    f"{zero3.window_values / 1e6:.4g} M",
                    "none" if zero3.tier == "memory" else str(zero3.num_buffers),
                )
                for name, zero3 in held
            ),
        ),
    )


def frontier_tables(plan: ClusterPlan) -> tuple[Table, ...]:
    """For each streamed model the choices that nothing beats in both throughput and latency."""
    return tuple(
        Table(
            title=f"Batch against speed: {model.name}",
            columns=(
                "REQUESTS",
                "TOKENS/S",
                "PER TOKEN",
                "RESIDENT LAYERS",
                "HELD",
                "FORMAT",
                "MICRO-BATCH",
                "KV CACHE",
                "BOUND BY",
            ),
            rows=tuple(
                (
                    str(point.rows) + (" *" if point == model.speed.chosen else ""),
                    f"{point.tokens_per_s:.3g}",
                    seconds_text(point.tpot_s),
                    str(point.resident_layers),
                    held_text(point.held_bytes),
                    format_text(point.precision, point.compression),
                    micro_batch_text(point.micro_batch_tokens),
                    point.kv_home,
                    point.bound,
                )
                for point in model.speed.frontier
            ),
        )
        for model in plan.models
        if model.speed is not None
    )


def micro_batch_text(tokens: int) -> str:
    """What a layer computes at a time."""
    return f"{tokens} tokens" if tokens else "the step"


def held_text(held_bytes: int) -> str:
    """What of the streamed records memory keeps."""
    return size_text(held_bytes) if held_bytes else "none"


def format_text(precision: str, compression: str, stored_share: float = 1.0) -> str:
    """Number format, and how it lies on disk."""
    if compression == "none":
        return precision
    share = f" to {stored_share:.0%}" if stored_share < 1 else ""
    return f"{precision}, {compression}{share}"


def seconds_text(seconds: float) -> str:
    """Three digits, in the unit that suits."""
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def _homes(model: ModelPlan, offload: OffloadPlan, speed: SpeedPlan) -> tuple[str, ...]:
    layers = sum(name.count(".") == 1 for name in offload.resident_units)
    others = [name for name in offload.resident_units if "." not in name]
    resident = ", ".join([f"{layers} layers"] * (layers > 0) + others) or "no layer"
    return (
        model.name,
        f"{resident} and ring: {size_text(model.memory.weights_bytes)}",
        f"{offload.ring_slots} slots" + _shared_text(offload),
        _host_text(model, offload),
        size_text(speed.host_bytes),
        size_text(speed.disk_bytes) + (" by each rank" if offload.num_sharing > 1 else ""),
        format_text(offload.precision, offload.compression, speed.stored_share),
    )


def _shared_text(offload: OffloadPlan) -> str:
    """Who else has the ring and what stays of the layers."""
    return f", shared by {offload.num_sharing} groups" if offload.num_sharing > 1 else ""


def _host_text(model: ModelPlan, offload: OffloadPlan) -> str:
    """What is pinned beside a device; a CPU has one memory."""
    if not model.memory.host_bytes:
        return "none"
    layers = sum(name.count(".") == 1 for name in offload.host_units)
    homes = f"{layers} layers: " if layers else ""
    return f"{homes}{size_text(model.memory.host_bytes)}"


def _computing(model: ModelPlan, offload: OffloadPlan) -> tuple[str, ...]:
    return (
        model.name,
        f"{micro_batch_text(offload.micro_batch_tokens)} at a time",
        f"{model.scheduler.max_step_tokens} tokens",
        _kv_text(model, offload),
    )


def _kv_text(model: ModelPlan, offload: OffloadPlan) -> str:
    size = size_text(model.kv.bytes_per_rank)
    if offload.kv_windows:
        tokens = offload.kv_window_blocks * model.kv.block_size
        return f"{size} on host, {offload.kv_windows} windows of {tokens} tokens"
    return f"{size} on {offload.kv_home}"


def _speed(model: ModelPlan, speed: SpeedPlan) -> tuple[str, ...]:
    chosen = speed.chosen
    rates = ", ".join(f"{name} {rate / 1e9:.3g} GB/s" for name, rate in speed.rates.items())
    return (
        model.name,
        f"{chosen.rows} of {speed.context_tokens} tokens",
        f"{chosen.tokens_per_s:.3g}",
        seconds_text(chosen.tpot_s),
        f"{seconds_text(speed.ttft_s)} after {speed.prompt_tokens} tokens",
        chosen.bound,
        rates,
    )
