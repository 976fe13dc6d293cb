"""Limits of one engine's scheduler, and which requests can never fit in them.

Plain ints, checked once; a request that is refused here would otherwise wait for ever.
"""

from __future__ import annotations

from dataclasses import dataclass

from cluster.base.errors import ConfigError, ContextTooLongError, InvalidRequestError
from replicas.api import GenerationRequest
from replicas.engine.speculation import SpeculationConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """Limits of one scheduler.

    Raises:
        ConfigError: a limit is below 1.
    """

    max_running_requests: int
    """Choices in a step."""
    max_step_tokens: int
    """Query tokens in a step."""
    max_context: int
    """Prompt and output tokens of one choice."""
    block_size: int
    num_blocks: int
    prefix_caching: bool = True
    max_waiting_requests: int = 256
    """Choices that may wait when another request arrives."""
    speculation: SpeculationConfig | None = None
    """How tokens are drafted; None: they are not."""

    def __post_init__(self) -> None:
        for name in (
            "max_running_requests",
            "max_step_tokens",
            "max_context",
            "block_size",
            "num_blocks",
            "max_waiting_requests",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be >= 1.", param=name)


def check_fits(request: GenerationRequest, config: SchedulerConfig) -> None:
    """Refuse a request that no amount of waiting could serve.

    Raises:
        ContextTooLongError: it is longer than the context, or than the whole KV cache.
        InvalidRequestError: it has no prompt, or asks one embedding to have several choices.
    """
    num_prompt_tokens = len(request.prompt_token_ids)
    if num_prompt_tokens == 0:
        raise InvalidRequestError("The prompt has no tokens.", param="prompt")
    if request.params.n < 1:
        raise InvalidRequestError(f"n is {request.params.n}; it must be >= 1.", param="n")
    if request.pooling is not None and request.params.n != 1:
        raise InvalidRequestError("An embedding has exactly one result; n must be 1.", param="n")
    max_tokens = 0 if request.pooling is not None else request.params.max_tokens
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
