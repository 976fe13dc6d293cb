"""Whether the records of a streamed model may be compressed, and what that would leave of them."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.base.errors import ConfigError, CorruptWeightsError
from cluster.base.offload_spec import OffloadSpec
from cluster.planner.drafts import Draft
from offload.compression import DTYPE, Compression
from offload.rates import Rates
from offload.stored_share import USUAL_SHARE, sampled_share
from replicas.models.hf_encoding import encoding_from_hf


@dataclass(frozen=True, slots=True, kw_only=True)
class CompressionChoice:
    """What the search may try."""

    kinds: tuple[Compression, ...]
    stored_share: float
    """Bytes of a lossless record against those of its image."""
    why_not: str = ""
    """Why `auto` leaves records as they are; empty where the search decides."""


def open_compression(
    draft: Draft, asked: OffloadSpec, rates: Rates, *, shares: bool
) -> CompressionChoice:
    """What the user, the weights and the machine leave open.

    Args:
        shares: replicas of a node map resident layers from the file.

    Raises:
        ConfigError: compression is asked for where there can be none.
    """
    if asked.compression == "none":
        return CompressionChoice(kinds=(Compression.NONE,), stored_share=1.0)
    why_not = _why_not(draft, asked, rates, shares=shares)
    if asked.compression == "lossless":
        if why_not:
            raise ConfigError(
                f"compression is lossless and {why_not}.",
                "Leave compression to auto.",
                param=draft.source.param("offload.compression"),
            )
        kinds: tuple[Compression, ...] = (Compression.LOSSLESS,)
    else:
        kinds = (Compression.NONE,) if why_not else tuple(Compression)
    share = 1.0 if why_not else _stored_share(draft)
    return CompressionChoice(kinds=kinds, stored_share=share, why_not=why_not)


def _why_not(draft: Draft, asked: OffloadSpec, rates: Rates, *, shares: bool) -> str:
    """Why records stay as they are whatever that costs; empty when they may be compressed."""
    if draft.on_gpu:
        return "records are not decoded on GPUs in this version"
    if not asked.pack:
        return "weights that are not packed have no records of their own"
    if draft.dtype.value != DTYPE:
        return f"only {DTYPE} weights get smaller, and these are {draft.dtype.value}"
    if asked.precision not in ("native", "auto"):
        return f"{asked.precision} codes get no smaller"
    if shares:
        return "replicas of a node share pages of the file, which have to be what is computed with"
    if not rates.decode_bytes_per_s:
        return "the codec cannot be compiled here"
    return ""


def _stored_share(draft: Draft) -> float:
    """From a sample of the checkpoint; its encoded weights would not tell."""
    checkpoint = draft.source.checkpoint
    if encoding_from_hf(checkpoint.config) is not None:
        return USUAL_SHARE
    try:
        return sampled_share(checkpoint.directory, checkpoint.files)
    except (CorruptWeightsError, OSError) as error:
        raise ConfigError(
            f"The weights of {checkpoint.directory} cannot be read ({error}).",
            "Fetch or export the checkpoint again.",
            param=draft.source.param("path"),
        ) from error
