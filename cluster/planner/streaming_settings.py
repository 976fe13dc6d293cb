"""What the user has decided of a streamed model, and what that leaves open to the search. Pure."""

from __future__ import annotations

from cluster.base.errors import ConfigError
from cluster.base.offload_spec import OffloadSpec
from cluster.planner.drafts import Draft
from cluster.planner.streaming_room import host_budget
from offload.compression import Compression
from offload.homes import KvHome
from offload.model_shape import ModelShape
from offload.precision import Precision
from offload.search_space import Choices


def refuse_unpacked(draft: Draft, asked: OffloadSpec) -> None:
    """What only packed weights can do.

    Raises:
        ConfigError: it is asked for without packing.
    """
    if asked.pack:
        return
    for key, harmless in (
        ("precision", ("native",)),
        ("compression", ("auto", "none")),
        ("share_resident", ("auto", "never")),
    ):
        value = getattr(asked, key)
        if value not in harmless:
            raise ConfigError(
                f"{key} is {value} and pack is false: only packed weights can be so.",
                f"Leave {key} out, or pack.",
                param=draft.source.param(f"offload.{key}"),
            )


def open_choices(
    draft: Draft, asked: OffloadSpec, model: ModelShape, compressions: tuple[Compression, ...]
) -> Choices:
    """What the user left open.

    Raises:
        ConfigError: `resident` or `ring_slots` leaves nothing to stream, or a setting would have no
            effect.
    """
    layers = len(model.layers)
    resident = None if isinstance(asked.resident, str) else asked.resident
    slots = (2, 3, 4) if isinstance(asked.ring_slots, str) else (asked.ring_slots,)
    streamed = layers - (resident or 0)
    if streamed < min(slots):
        slots = (1,) if isinstance(asked.ring_slots, str) and streamed == 1 else slots
    if streamed < min(slots):
        key = "ring_slots" if streamed >= 1 else "resident"
        raise ConfigError(
            f"Of {layers} layers {max(0, streamed)} are left to stream through {min(slots)} slots.",
            "Lower `resident` or `ring_slots`, or delete the `offload` section.",
            param=draft.source.param(f"offload.{key}"),
        )
    if asked.precision != "auto":
        precisions: tuple[Precision, ...] = (Precision(asked.precision),)
    else:  # only native records can be compressed
        asks = asked.compression == "lossless"
        precisions = (Precision.NATIVE,) if asks else tuple(Precision)
    return Choices(
        precisions=precisions,
        compressions=compressions,
        may_hold=_may_hold(draft, asked, model),
        ring_slots=slots,
        resident_layers=resident,
        kv_homes=_kv_homes(draft, asked),
        host_experts=_host_experts(draft, asked, model, precisions),
    )


def _may_hold(draft: Draft, asked: OffloadSpec, model: ModelShape) -> bool:
    """Of a dense model on a CPU rank of its own, unless the user says what stays."""
    is_dense = not any(layer.experts for layer in model.layers)
    is_free = isinstance(asked.resident, str) and draft.layout.dp_size == 1
    return is_dense and is_free and not draft.on_gpu


def _host_experts(
    draft: Draft, asked: OffloadSpec, model: ModelShape, precisions: tuple[Precision, ...]
) -> tuple[bool, ...]:
    """Whether the host may compute experts.

    Raises:
        ConfigError: it is to compute some and there cannot be any.
    """
    why = ""
    if not draft.on_gpu:
        why = "the ranks run on the CPU, which computes all of them"
    elif not any(layer.experts for layer in model.layers):
        why = "the model is dense"
    elif Precision.NATIVE not in precisions:
        why = f"{asked.precision} codes are computed with on the GPU only"
    if asked.host_experts == "always":
        if why:
            raise ConfigError(
                f"host_experts is always, and there are none that the host could compute: {why}.",
                "Leave host_experts out.",
                param=draft.source.param("offload.host_experts"),
            )
        return (True,)
    return (False,) if why or asked.host_experts == "never" else (False, True)


def _kv_homes(draft: Draft, asked: OffloadSpec) -> tuple[KvHome, ...]:
    """Of a CPU rank: a stream from host memory to host memory is only taken when asked for.

    Raises:
        ConfigError: host memory is asked for and not used, or used and not there; a GPU's cache is
            asked for elsewhere.
    """
    if draft.on_gpu:
        if asked.kv_home in ("host", "streamed"):
            raise ConfigError(
                f"kv_home is {asked.kv_home}, and ranks on GPUs have their cache there: the host's "
                "memory beside them is for weights.",
                "Leave kv_home out, or set device: cpu.",
                param=draft.source.param("offload.kv_home"),
            )
        return (KvHome.DEVICE,)
    host = host_budget(asked)
    if asked.kv_home == "auto":
        return (KvHome.DEVICE, KvHome.HOST) if host else (KvHome.DEVICE,)
    home = KvHome(asked.kv_home)
    if home is KvHome.DEVICE and host:
        raise ConfigError(
            "host_memory is set and kv_home is device: nothing would be there.",
            "Leave host_memory out, or set kv_home to host.",
            param=draft.source.param("offload.host_memory"),
        )
    if home is not KvHome.DEVICE and not host:
        raise ConfigError(
            f"kv_home is {home} and there is no host_memory for it.",
            "Set offload.host_memory.",
            param=draft.source.param("offload.kv_home"),
        )
    return (home,)


def asked_micro_batch(draft: Draft, asked: OffloadSpec) -> int | None:
    """The user's; None: what is found to be best.

    Raises:
        ConfigError: no step has more tokens.
    """
    if isinstance(asked.micro_batch, str):
        return None
    step = draft.source.spec.limits.max_step_tokens
    if isinstance(step, int) and asked.micro_batch >= step:
        raise ConfigError(
            f"micro_batch is {asked.micro_batch} and no step has more than {step} tokens: it would "
            "change nothing.",
            "Lower micro_batch, or leave it to auto.",
            param=draft.source.param("offload.micro_batch"),
        )
    return asked.micro_batch
