"""The one validator of both fronts: raw request -> checked request, in two halves.

`check_*` looks at everything that needs no tokenizer and is cheap enough to run before admission;
`build_generation` takes the prompt's ids and yields the engine's request. Nothing downstream checks
again, so every range the engine relies on is enforced here. User input never meets `assert`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence

from cluster.base.errors import (
    InvalidRequestError,
    UnknownModelError,
)
from cluster.base.front_plan import LimitsPlan
from cluster.base.ids import is_client_id, new_request_id
from replicas.api import GenerationRequest, Pooling, SamplingParams
from router import field_checks as check
from router import prompt_checks as prompts
from router.api import EmbedInput, GenerationInput, ScoreInput
from router.checked_requests import CheckedEmbed, CheckedGeneration, CheckedScore, Prompt
from router.sampling_fields import INT32_MAX, check_sampling
from router.served_model import ServedModel
from router.tools.check_tools import check_tools
from router.tools.forced_calls import tool_sampling

DEFAULT_COMPLETION_TOKENS = 16
"""What OpenAI's completions generate when max_tokens is unset."""
MAX_TIMEOUT_S = 86_400.0
MAX_DIMENSIONS = 1 << 20


class Validator:
    """Checks requests against the served models and the limits; holds no state of requests."""

    def __init__(
        self,
        models: Mapping[str, ServedModel],
        limits: LimitsPlan,
        *,
        draw_seed: Callable[[], int],
    ) -> None:
        """`draw_seed()` gives a fresh seed in [0, 2^63) for a request that names none."""
        self._models = models
        self._limits = limits
        self._draw_seed = draw_seed

    def model(self, name: object) -> ServedModel:
        """The served model of that name.

        Raises:
            InvalidRequestError: the name is missing or no string.
            UnknownModelError: nothing of that name is served; names the nearest.
        """
        if not isinstance(name, str) or not name:
            raise check.bad_field("model", "must name a served model", self._served(""))
        found = self._models.get(name)
        if found is None:
            raise UnknownModelError(
                f"Model '{check.shown(name)}' is not served here.",
                self._served(name),
                param="model",
            )
        return found

    def _served(self, name: str) -> str:
        near = difflib.get_close_matches(name[:64], self._models, n=3, cutoff=0.4)
        return "Served: " + ", ".join(near or list(self._models)[:3]) + "."

    def check_generation(self, raw: GenerationInput) -> CheckedGeneration:
        """Check a generation; the prompt's length is checked by `build_generation`."""
        model = self.model(raw.model)
        tools = check_tools(raw, model)
        sampling = check_sampling(tool_sampling(raw.sampling, tools), model, self._limits)
        echo = check.boolean("echo", raw.echo)
        if echo and raw.messages is not None:
            raise check.bad_field("echo", "is not available for chat")
        if sampling.max_tokens == 0 and not echo and sampling.params["prompt_logprobs"] is None:
            raise check.bad_field(
                "max_tokens", "must be at least 1", "0 makes sense with echo or prompt_logprobs."
            )
        return CheckedGeneration(
            request_id=request_id_or_new(raw.request_id),
            model=model,
            prompt=prompts.generation_prompt(raw, model, tools),
            sampling=sampling,
            tools=tools,
            priority=check.integer("priority", raw.priority, -INT32_MAX - 1, INT32_MAX),
            echo=echo,
            timeout_s=self.timeout_s(raw.timeout_s),
        )

    def timeout_s(self, raw: object) -> float:
        """The request's own deadline, or the default one for 0; 0.0 when there is none."""
        value = check.number("timeout_s", raw, 0.0, MAX_TIMEOUT_S)
        return value or self._limits.default_timeout_s

    def check_embed(self, raw: EmbedInput) -> CheckedEmbed:
        """Check an embedding request."""
        model = self.model(raw.model)
        if model.plan.zero3 is not None:
            raise InvalidRequestError(
                f"Model '{model.plan.name}' gives no embeddings: transformers' own code computes "
                "it (deepspeed-zero3), of which only logits are taken.",
                "Ask a model with engine tensor_parallel.",
                param="model",
            )
        try:
            pooling = Pooling(raw.pooling or "last")
        except ValueError:
            raise check.bad_field("pooling", "must be 'last' or 'mean'") from None
        return CheckedEmbed(
            request_id=request_id_or_new(raw.request_id),
            model=model,
            inputs=self._prompts("inputs", raw.inputs, model),
            pooling=pooling,
            normalize=check.boolean("normalize", raw.normalize),
            dimensions=check.integer("dimensions", raw.dimensions, 0, MAX_DIMENSIONS),
            timeout_s=self.timeout_s(raw.timeout_s),
        )

    def check_score(self, raw: ScoreInput) -> CheckedScore:
        """Check a scoring request."""
        model = self.model(raw.model)
        return CheckedScore(
            request_id=request_id_or_new(raw.request_id),
            model=model,
            prompt=prompts.text_or_ids("prompt", raw.prompt, model),
            continuations=self._prompts("continuations", raw.continuations, model),
            timeout_s=self.timeout_s(raw.timeout_s),
        )

    def build_generation(
        self, checked: CheckedGeneration, prompt_ids: Sequence[int]
    ) -> GenerationRequest:
        """The engine's request, now that the prompt's ids are known.

        Raises:
            ContextTooLongError: prompt plus max_tokens do not fit.
            InvalidRequestError: no prompt token, or min_tokens > max_tokens.
        """
        room = self.room(checked.model, prompt_ids, _prompt_param(checked.prompt))
        params = dict(checked.sampling.params)
        max_tokens = self._max_tokens(checked, room)
        if max_tokens > room:
            raise prompts.too_long(checked.model, len(prompt_ids), max_tokens, "max_tokens")
        if params["min_tokens"] > max_tokens:
            raise check.bad_field("min_tokens", f"must be at most max_tokens ({max_tokens})")
        if params["seed"] is None:
            params["seed"] = self._draw_seed()
        return GenerationRequest(
            request_id=checked.request_id,
            prompt_token_ids=tuple(prompt_ids),
            params=SamplingParams(max_tokens=max_tokens, **params),
            priority=checked.priority,
        )

    def _prompts(self, param: str, raw: object, model: ServedModel) -> tuple[Prompt, ...]:
        return prompts.prompts(param, raw, model, self._limits.max_prompts_per_request)

    def least_tokens(self, checked: CheckedGeneration, prompt_ids: Sequence[int]) -> int:
        """Tokens that a place for the request must hold: with the output that was asked for, or
        where its length is left open, at least one token of it."""
        asked = checked.sampling.max_tokens
        return len(prompt_ids) + (1 if asked is None else asked)

    def room(self, model: ServedModel, prompt_ids: Sequence[int], param: str) -> int:
        """Tokens that fit after a prompt; also checks that its ids are the model's.

        Raises:
            ContextTooLongError: the prompt alone does not fit.
            InvalidRequestError: the prompt has no token, or one the model has no row for.
        """
        if not prompt_ids:
            raise check.bad_field(param, "must hold at least one token")
        if max(prompt_ids) >= model.plan.vocab_size:
            raise check.bad_field(
                param, f"holds a token the model has no embedding for (id {max(prompt_ids)})"
            )
        room = model.max_tokens_per_choice - len(prompt_ids)
        if room < 0:
            raise prompts.too_long(model, len(prompt_ids), 0, param)
        return room

    def _max_tokens(self, checked: CheckedGeneration, room: int) -> int:
        asked = checked.sampling.max_tokens
        if asked is not None:
            return asked
        wanted = checked.model.defaults.max_new_tokens
        if wanted is None:
            wanted = room if checked.prompt.messages is not None else DEFAULT_COMPLETION_TOKENS
        # At least 1: a prompt that fills the context is refused rather than answered with nothing.
        return max(1, min(wanted, room))


def request_id_or_new(raw: object) -> str:
    """The client's id, or a fresh one when it gave none.

    Raises:
        InvalidRequestError: the id has characters or a length that are not allowed.
    """
    if raw is None or raw == "":
        return new_request_id()
    if isinstance(raw, str) and is_client_id(raw):
        return raw
    raise check.bad_field(
        "request_id",
        "must match [A-Za-z0-9._-]{1,64}",
        "Leave it empty to get one from the server.",
    )


def _prompt_param(prompt: Prompt) -> str:
    return "messages" if prompt.messages is not None else "prompt"
