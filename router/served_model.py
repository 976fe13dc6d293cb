"""One model as the gateway serves it: its plan and the text side of its checkpoint.

Immutable after construction and shared by all requests. No weights, no torch.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cluster.base.errors import InvalidRequestError
from cluster.base.plan import ModelPlan
from replicas.text.chat_template import ChatTemplate
from replicas.text.generation_defaults import GenerationDefaults
from replicas.text.tokenizer import Tokenizer
from router.api import ChatTurn
from router.tools.call_formats import CallFormat, format_of_template


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """A model's plan, tokenizer, chat template and generation defaults."""

    plan: ModelPlan
    tokenizer: Tokenizer
    chat_template: ChatTemplate | None
    defaults: GenerationDefaults
    created: int = field(default_factory=lambda: int(time.time()))
    overflow: ServedModel | None = None
    """Where requests go that this one cannot take; the same checkpoint."""

    @classmethod
    def from_plan(cls, plan: ModelPlan) -> ServedModel:
        """Read the text side of the planned checkpoint.

        Raises:
            ConfigError: the directory lacks a tokenizer or holds a broken one.
        """
        return cls(
            plan=plan,
            tokenizer=Tokenizer.from_directory(plan.path),
            chat_template=ChatTemplate.from_directory(plan.path),
            defaults=GenerationDefaults.from_directory(plan.path),
        )

    @property
    def max_tokens_per_choice(self) -> int:
        """Prompt plus output tokens that one choice may hold: context, or all of the KV cache."""
        return min(
            self.plan.scheduler.max_context, self.plan.kv.num_blocks * self.plan.kv.block_size
        )

    @property
    def longest(self) -> ServedModel:
        """This model, or the one it overflows to if that holds longer requests."""
        other = self.overflow
        if other is not None and other.max_tokens_per_choice > self.max_tokens_per_choice:
            return other
        return self

    @property
    def call_format(self) -> CallFormat | None:
        """How it writes tool calls, as the plan says or else its template; None: not known."""
        if self.plan.tool_call_parser != "auto":
            return CallFormat(self.plan.tool_call_parser)
        template = self.chat_template
        return None if template is None else format_of_template(template.tool_source)

    def encode_chat(
        self, messages: Sequence[ChatTurn], tools: Sequence[Mapping[str, Any]] = ()
    ) -> list[int]:
        """Token ids of a conversation, up to where the model's answer begins.

        Args:
            tools: what the model may call.

        Raises:
            InvalidRequestError: the model has no template, or it refuses the messages.
        """
        if self.chat_template is None:
            raise InvalidRequestError(
                f"Model {self.plan.name!r} has no chat template.",
                "Send a plain prompt instead.",
                param="messages",
            )
        turns = [
            {
                "role": turn.role,
                "content": turn.content,
                **({"name": turn.name} if turn.name else {}),
                **({"tool_calls": turn.tool_calls} if turn.tool_calls else {}),
                **({"tool_call_id": turn.tool_call_id} if turn.tool_call_id else {}),
            }
            for turn in messages
        ]
        return self.tokenizer.encode_template(self.chat_template.render(turns, tools=tools))


def serve_models(
    plans: Iterable[ModelPlan], known: Mapping[str, ServedModel] | None = None
) -> dict[str, ServedModel]:
    """All models of a cluster by name, each with the one it overflows to.

    Args:
        known: models served so far; what was read of a checkpoint is not read again.

    Raises:
        ConfigError: a checkpoint lacks a tokenizer or holds a broken one.
    """
    models = {plan.name: _serve_model(plan, (known or {}).get(plan.name)) for plan in plans}
    return {
        name: model
        if model.plan.overflow is None
        else dataclasses.replace(model, overflow=models[model.plan.overflow.model])
        for name, model in models.items()
    }


def _serve_model(plan: ModelPlan, known: ServedModel | None) -> ServedModel:
    if known is None or known.plan.path != plan.path:
        return ServedModel.from_plan(plan)
    return dataclasses.replace(known, plan=plan, overflow=None)
