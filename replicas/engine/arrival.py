"""Which requests a scheduler takes in. One that can never fit would otherwise wait for ever."""

from __future__ import annotations

from cluster.base.errors import (
    ContextTooLongError,
    InternalError,
    InvalidRequestError,
    OverloadedError,
)
from replicas.api import GenerationRequest
from replicas.engine.scheduler_config import SchedulerConfig


def check_fits(request: GenerationRequest, config: SchedulerConfig) -> None:
    """Refuse a request that no amount of waiting could serve.

    Raises:
        ContextTooLongError: it is longer than the context, or than the whole KV cache.
        InvalidRequestError: it has no prompt, or asks one embedding to have several choices.
        InternalError: it is to be resumed where it cannot have been.
    """
    num_prompt_tokens = len(request.prompt_token_ids)
    if num_prompt_tokens == 0:
        raise InvalidRequestError("The prompt has no tokens.", param="prompt")
    if request.params.n < 1:
        raise InvalidRequestError(f"n is {request.params.n}; it must be >= 1.", param="n")
    if request.pooling is not None and request.params.n != 1:
        raise InvalidRequestError("An embedding has exactly one result; n must be 1.", param="n")
    max_tokens = 0 if request.pooling is not None else request.params.max_tokens
    _check_progress(request, max_tokens)
    longest_prompt = config.max_context - (1 if max_tokens else 0)
    if num_prompt_tokens > longest_prompt:
        raise ContextTooLongError(
            f"The prompt has {num_prompt_tokens} tokens; with a context of {config.max_context} "
            f"it may have at most {longest_prompt}.",
            "Shorten the prompt.",
            param="prompt",
        )
    # The last token of all is sampled and never computed, so it needs no KV.
    num_tokens = min(num_prompt_tokens + max_tokens, config.max_context)
    num_kv_tokens = max(num_tokens - 1, num_prompt_tokens)
    capacity = config.num_blocks * config.block_size
    if num_kv_tokens > capacity:
        raise ContextTooLongError(
            f"{num_prompt_tokens} prompt tokens and up to {num_tokens - num_prompt_tokens} output "
            f"tokens need KV memory for {num_kv_tokens} tokens; the replica has {capacity} "
            f"({config.num_blocks} blocks of {config.block_size}).",
            "Lower max_tokens, shorten the prompt or give the replica more KV memory.",
            param="max_tokens",
        )


def check_arrival(
    request: GenerationRequest, config: SchedulerConfig, *, is_known: bool, num_waiting: int
) -> None:
    """Refuse a request that cannot come now. A resumed one was let in once, and always may.

    Raises:
        InvalidRequestError: one with its id is running (`is_known`).
        OverloadedError: too many wait already.
    """
    if is_known:
        raise InvalidRequestError(
            f"A request with the id {request.request_id!r} is running already.",
            "Choose another id.",
            param="request_id",
        )
    limit = config.max_waiting_requests
    if num_waiting >= limit and not request.resumed:
        raise OverloadedError(
            f"{num_waiting} requests are waiting; the limit is {limit}.", "Retry later."
        )


def _check_progress(request: GenerationRequest, max_tokens: int) -> None:
    indices = [choice.index for choice in request.resumed]
    if len(set(indices)) < len(indices) or not set(indices) <= set(range(request.params.n)):
        raise InternalError(f"A request of {request.params.n} choices resumes {indices}.")
    for choice in request.resumed:
        if choice.token_ids and len(choice.token_ids) >= max_tokens:
            raise InternalError(
                f"Choice {choice.index} of {max_tokens} tokens is to be resumed behind "
                f"{len(choice.token_ids)}."
            )
