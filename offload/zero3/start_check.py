"""Proof at start that a model computes the same over KV blocks as on its own.

transformers has hundreds of architectures. One that ignores the cache, the mask or the positions
it is given would answer wrongly and say nothing, so a few tokens are computed both ways: in one
plain pass, and in pieces, padded, beside another request.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cluster.base.errors import ConfigError
from offload.zero3.engine import Zero3Engine
from offload.zero3.model import HookedWeights, Zero3Model
from replicas.attention.backend import AttentionMetadata
from replicas.models.decoder import ForwardBatch

NUM_TOKENS = 9
# (first position, end) of the long request and of the short one, which begins alike.
_STEPS = (((0, 5), (0, 2)), ((5, 9), (2, 3)))
_TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 0.1}
"""Largest difference of two logits, as a part of the spread of all."""


@torch.inference_mode()
def check_model(
    engine: Zero3Engine,
    model: Zero3Model,
    kv_caches: Sequence[torch.Tensor],
    block_size: int,
    dtype: torch.dtype,
) -> None:
    """Compute both ways and compare; leaves the blocks zeroed.

    Raises:
        ConfigError: the results differ, or the model cannot run so.
    """
    tokens = torch.arange(1, NUM_TOKENS + 1) * 7919 % model.arch.vocab_size
    weights = HookedWeights(engine)
    try:
        wanted_TV = engine.module(input_ids=tokens[None], use_cache=False).logits[0].float()
        worst = 0.0
        for long, short in _STEPS:
            got_TV = model.forward(_batch(tokens, (long, short), block_size), weights, kv_caches)
            same_TV = torch.cat([wanted_TV[slice(*long)], wanted_TV[slice(*short)]])
            worst = max(worst, (got_TV.float() - same_TV).abs().max().item())
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError) as error:
        lines = str(error).splitlines() or [type(error).__name__]
        raise _unfit(model, f"does not run over it: {lines[0][:300]}") from error
    finally:
        for cache in kv_caches:
            cache.zero_()
    spread = (wanted_TV.max() - wanted_TV.min()).item()
    # Written so that NaN fails too.
    if not worst <= _TOLERANCE[dtype] * spread:
        raise _unfit(model, f"gives logits that differ by {worst:.3g} of {spread:.3g}")


def _unfit(model: Zero3Model, how: str) -> ConfigError:
    return ConfigError(
        f"transformers' {model.name} cannot be served from a paged cache: it {how}.",
        "This architecture is not supported; see docs/offload.md.",
    )


def _batch(tokens: torch.Tensor, spans: Sequence[tuple[int, int]], block_size: int) -> ForwardBatch:
    """Pieces of two requests in blocks of their own, as a step of the engine would pack them."""
    per_request = -(-NUM_TOKENS // block_size)
    positions_T = torch.cat([torch.arange(*span) for span in spans])
    tables_RN = torch.arange(len(spans) * per_request).view(len(spans), per_request)
    owner_T = torch.cat([torch.full((stop - at,), i) for i, (at, stop) in enumerate(spans)])
    lens = torch.tensor([stop - start for start, stop in spans])
    starts = [0, *torch.cumsum(lens, 0).tolist()]
    seq_lens = [stop for _, stop in spans]
    slots_T = tables_RN[owner_T, positions_T // block_size] * block_size + positions_T % block_size
    return ForwardBatch(
        token_ids_T=tokens[positions_T],
        positions_T=positions_T,
        attention=AttentionMetadata(
            query_start=tuple(starts),
            seq_lens=tuple(seq_lens),
            query_start_R1=torch.tensor(starts),
            seq_lens_R=torch.tensor(seq_lens),
            block_tables_RN=tables_RN,
            slot_mapping_T=slots_T,
        ),
    )
