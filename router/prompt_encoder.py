"""Prompts to token ids, without stopping the event loop for a long text.

A text far beyond the context is refused after tokenising only its beginning: a hostile prompt
costs what a full context costs, not what its own length would.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from router.checked_requests import Prompt
from router.prompt_checks import too_long
from router.served_model import ServedModel

INLINE_CHARS = 16_384
"""Longer prompts are tokenised in a thread (a short one takes less time than the hand-over)."""

PROBE_CHARS_PER_TOKEN = 8
"""A text with more characters per token of room than this has its beginning looked at first."""
PROBE_MARGIN_TOKENS = 256
"""How far a cut can change the count of what precedes it, generously."""


async def encode_prompt(model: ServedModel, prompt: Prompt, *, special: bool = True) -> list[int]:
    """Token ids of a checked prompt; `special` adds BOS and EOS where the model wants them.

    Raises:
        InvalidRequestError: the chat template refuses the messages.
        ContextTooLongError: the beginning alone is longer than the context.
    """
    if prompt.token_ids is not None:
        return list(prompt.token_ids)
    if _num_chars(prompt) <= INLINE_CHARS:
        return _encode(model, prompt, special)
    return await asyncio.to_thread(_encode, model, prompt, special)


def _encode(model: ServedModel, prompt: Prompt, special: bool) -> list[int]:
    _refuse_hopeless(model, prompt)
    if prompt.messages is not None:
        return model.encode_chat(prompt.messages, prompt.tools)
    return model.tokenizer.encode(prompt.text or "", add_special_tokens=special)


async def token_texts(model: ServedModel, token_ids: Sequence[int]) -> list[str]:
    """Printable form of each token."""
    if len(token_ids) <= INLINE_CHARS // 4:
        return [model.tokenizer.token_text(token_id) for token_id in token_ids]
    return await asyncio.to_thread(
        lambda: [model.tokenizer.token_text(token_id) for token_id in token_ids]
    )


def _refuse_hopeless(model: ServedModel, prompt: Prompt) -> None:
    model = model.longest
    limit = model.max_tokens_per_choice
    probe = PROBE_CHARS_PER_TOKEN * (limit + PROBE_MARGIN_TOKENS)
    texts = [(prompt.text or "", "prompt")]
    # Templates keep what users and operators write; of the model's own turns some keep less.
    texts += [(t.content, "messages") for t in prompt.messages or () if t.role != "assistant"]
    for text, param in texts:
        if len(text) > probe:
            count = len(model.tokenizer.encode(text[:probe], add_special_tokens=False))
            if count > limit + PROBE_MARGIN_TOKENS:
                raise too_long(model, f"first {count}", 0, param)


def _num_chars(prompt: Prompt) -> int:
    if prompt.text is not None:
        return len(prompt.text)
    return sum(len(turn.content) for turn in prompt.messages or ()) + prompt.tool_chars
