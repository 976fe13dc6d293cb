"""What the gateway does, once for both fronts: validate, admit, tokenise, route, stream.

Implements `router.api.Handler`. Every method raises `PenstockError` subclasses only; a fault in one
request's text side ends that request. Whatever way a request ends, its place is given back and its
replica is told to stop.
"""

from __future__ import annotations

import dataclasses
import os
import random
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from cluster.base.front_plan import LimitsPlan
from cluster.base.ids import is_client_id
from router import field_checks as check
from router import prompt_checks
from router.admission import Admission
from router.api import (
    ChatTurn,
    EmbedInput,
    EmbedOutput,
    Generation,
    GenerationInput,
    ModelInfo,
    ScoreInput,
    ScoreOutput,
    Tier,
)
from router.checked_requests import CheckedGeneration, Prompt
from router.directory import ReplicaDirectory
from router.dispatcher import Dispatcher
from router.fault_boundary import fault_boundary
from router.generation_stream import GenerationStream
from router.overflow import choose_tier, tier_of
from router.prompt_encoder import encode_prompt, token_texts
from router.running_requests import RunningRequest, RunningRequests
from router.served_model import ServedModel
from router.status import cluster_status, model_infos
from router.validate import Validator
from router.whole_answers import WholeAnswers

ResultT = TypeVar("ResultT")

MAX_DETOKENIZE_IDS = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayIdentity:
    """What this gateway says about itself."""

    cluster: str
    version: str
    dashboard_url: str = ""
    pid: int = field(default_factory=os.getpid)


class GatewayHandler:
    """Implements `router.api.Handler` over a directory of replicas; lives on one event loop."""

    def __init__(
        self,
        models: Mapping[str, ServedModel],
        limits: LimitsPlan,
        directory: ReplicaDirectory,
        dispatcher: Dispatcher,
        identity: GatewayIdentity,
        *,
        random_source: random.Random | None = None,
    ) -> None:
        """`random_source` draws unset seeds and retry delays; the system's by default."""
        self._random = random_source or secrets.SystemRandom()
        self._identity = identity
        self._directory = directory
        self._dispatcher = dispatcher
        self._admission = Admission(limits, random_source=self._random)
        self._running = RunningRequests(self._admission)
        self.serve(models, limits)

    def serve(self, models: Mapping[str, ServedModel], limits: LimitsPlan) -> None:
        """Serve these models within these limits from now on; running requests are left alone."""
        self._models = dict(models)
        self._admission.set_limits(limits)
        self._dispatcher.set_limits(limits)
        self._validator = Validator(
            self._models, limits, draw_seed=lambda: self._random.getrandbits(63)
        )
        self._whole = WholeAnswers(self._validator, self._dispatcher)

    async def generate(self, request: GenerationInput) -> Generation:
        """Validate, admit, tokenise, route and start one generation."""
        checked = self._validator.check_generation(request)
        running = self._running.admit(
            checked.request_id, checked.prompt.estimated_tokens(checked.model), checked.timeout_s
        )
        try:
            with fault_boundary(checked.request_id):
                pieces, tier = await self._start(checked, running)
        except BaseException:
            running.end()
            raise
        return Generation(
            request_id=checked.request_id,
            model=checked.model.plan.name,
            created=int(time.time()),
            pieces=pieces,
            tier=tier,
            tools=checked.tools,
        )

    async def _start(
        self, checked: CheckedGeneration, running: RunningRequest
    ) -> tuple[GenerationStream, Tier]:
        prompt_ids = await encode_prompt(checked.model, checked.prompt)
        num_tokens = self._validator.least_tokens(checked, prompt_ids)
        model, reason = choose_tier(checked.model, num_tokens, self._dispatcher.views)
        request = self._validator.build_generation(
            dataclasses.replace(checked, model=model), prompt_ids
        )
        running.set_waiting_tokens(len(prompt_ids))
        channel = self._dispatcher.submit(model.plan.name, request)
        running.attach(channel)
        stream = GenerationStream(running, channel, request, model, checked.sampling.text)
        if checked.echo:
            text = checked.prompt.text
            if text is None:
                text = model.tokenizer.decode(
                    prompt_ids, skip_special_tokens=checked.sampling.text.skip_special_tokens
                )
            stream.echo(text)
        return stream, tier_of(model, reason)

    async def embed(self, request: EmbedInput) -> EmbedOutput:
        """Embed each input."""
        checked = self._validator.check_embed(request)
        running = self._running.admit(
            checked.request_id, _estimate(checked.model, checked.inputs), checked.timeout_s
        )
        return await _to_its_end(running, lambda: self._whole.embed(checked, running))

    async def score(self, request: ScoreInput) -> ScoreOutput:
        """Score each continuation."""
        checked = self._validator.check_score(request)
        model, continuations = checked.model, checked.continuations
        whole = checked.prompt.estimated_tokens(model) * len(continuations)
        running = self._running.admit(
            checked.request_id, whole + _estimate(model, continuations), checked.timeout_s
        )
        return await _to_its_end(running, lambda: self._whole.score(checked, running))

    async def tokenize(
        self,
        model: object,
        text: object,
        messages: Sequence[ChatTurn] | None,
        add_special_tokens: bool,
    ) -> tuple[list[int], list[str]]:
        """Token ids and their printable forms."""
        served = self._validator.model(model)
        if messages is not None:
            prompt = Prompt(messages=prompt_checks.messages(messages))
        else:
            prompt = Prompt(text=check.text("text", text))
        special = check.boolean("add_special_tokens", add_special_tokens)
        with fault_boundary("tokenize"):
            ids = await encode_prompt(served, prompt, special=special)
            return ids, await token_texts(served, ids)

    async def detokenize(self, model: object, token_ids: object, skip_special: bool) -> str:
        """Text of token ids."""
        served = self._validator.model(model)
        ids = prompt_checks.token_ids("token_ids", token_ids, served, MAX_DETOKENIZE_IDS)
        skip = check.boolean("skip_special_tokens", skip_special)
        with fault_boundary("detokenize"):
            return served.tokenizer.decode(ids, skip_special_tokens=skip)

    def list_models(self) -> list[ModelInfo]:
        """All models of the cluster file, ready or not."""
        return model_infos(self._models, self._directory)

    async def cancel(self, request_id: str) -> bool:
        """Stop a running request; its stream ends with finish reason ABORT.

        One of another gateway (they share a port) is found by the replica that works on it.
        """
        if self._running.abort(request_id):
            return True
        return is_client_id(request_id) and await self._directory.cancel_named(request_id)

    async def status(self) -> dict[str, Any]:
        """The cluster as this gateway sees it; keys follow the proto's StatusResponse."""
        return {
            "cluster": self._identity.cluster,
            "version": self._identity.version,
            **cluster_status(self._models, self._directory),
            "active_requests": len(self._running),
            "resumed_requests": self._dispatcher.num_resumed,
            "gateway_pid": self._identity.pid,
            "dashboard_url": self._identity.dashboard_url,
        }

    def ready(self) -> bool:
        """Whether every model has at least one replica that can take requests."""
        models = self.list_models()
        return bool(models) and all(info.ready_replicas > 0 for info in models)


async def _to_its_end(running: RunningRequest, work: Callable[[], Awaitable[ResultT]]) -> ResultT:
    try:
        with fault_boundary(running.request_id):
            return await work()
    finally:
        running.end()


def _estimate(model: ServedModel, prompts: Sequence[Prompt]) -> int:
    return sum(prompt.estimated_tokens(model) for prompt in prompts)
