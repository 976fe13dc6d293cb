"""The endpoints: read a body, call the handler, print its answer.

Everything raises; `app.py` says how each error is answered. Work that a client could leave is run
`while_connected`, so nothing goes on for a closed connection.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from cluster.base.errors import UnknownModelError
from cluster.base.front_plan import LimitsPlan
from router import field_checks as check
from router.api import Generation, Handler, ModelInfo
from router.http.answer_shapes import (
    AnswerShape,
    CompletionShape,
    ShapeOptions,
    WholeChoice,
)
from router.http.disconnect import while_connected
from router.http.embedding_body import embedding_answer, embedding_job, tokenize_job
from router.http.event_stream import open_event_stream
from router.http.generation_body import GenerationJob, chat_job, completion_job
from router.http.json_body import read_json_object
from router.http.json_text import json_bytes
from router.http.limits import HttpLimits
from router.http.piece_source import PieceSource, start_generations
from router.http.request_head import request_id_of
from router.http.response_format import output_names
from router.http.tool_answer import chat_shape
from router.http.wire_fields import (
    DETOKENIZE_FIELDS,
    chat_names,
    check_fields,
    names_on_the_wire,
    tool_names,
)

_ShapeMaker = Callable[[Generation, ShapeOptions], AnswerShape]


class Endpoints:
    """OpenAI's paths and the operators' ones over one handler."""

    def __init__(
        self,
        handler: Handler,
        limits: LimitsPlan,
        http_limits: HttpLimits,
        metrics: CollectorRegistry,
    ) -> None:
        self._handler = handler
        self._limits = limits
        self._http_limits = http_limits
        self._metrics = metrics

    async def completions(self, request: Request) -> ASGIApp:
        """POST /v1/completions."""
        body = await self._body(request)
        job = completion_job(body, self._limits, request_id_of(request.scope), _peer(request))
        return await self._generate(request, job, CompletionShape, output_names(body))

    async def chat(self, request: Request) -> ASGIApp:
        """POST /v1/chat/completions."""
        body = await self._body(request)
        job = chat_job(body, request_id_of(request.scope), _peer(request))
        names = chat_names(body) | output_names(body) | tool_names(body)
        return await self._generate(request, job, chat_shape, names)

    async def embeddings(self, request: Request) -> ASGIApp:
        """POST /v1/embeddings."""
        body = await self._body(request)
        job = embedding_job(body, self._limits, request_id_of(request.scope))
        with names_on_the_wire({"inputs": "input"}):
            output = await while_connected(request.receive, self._handler.embed(job.request))
        return _json(embedding_answer(job, output))

    async def tokenize(self, request: Request) -> ASGIApp:
        """POST /tokenize."""
        job = tokenize_job(await self._body(request))
        with names_on_the_wire({"text": "prompt"}):
            ids, texts = await self._handler.tokenize(
                job.model, job.text, job.messages, job.add_special_tokens
            )
        answer: dict[str, Any] = {
            "count": len(ids),
            "max_model_len": self._info(str(job.model)).max_context,
            "tokens": ids,
            "token_strs": texts if job.token_strings else None,
        }
        return _json(answer)

    async def detokenize(self, request: Request) -> ASGIApp:
        """POST /detokenize."""
        body = await self._body(request)
        check_fields(body, DETOKENIZE_FIELDS)
        skip = body.get("skip_special_tokens")
        with names_on_the_wire({"token_ids": "tokens"}):
            text = await self._handler.detokenize(
                body.get("model"), body.get("tokens"), False if skip is None else skip
            )
        return _json({"prompt": text})

    async def models(self, request: Request) -> ASGIApp:
        """GET /v1/models."""
        return _json(
            {"object": "list", "data": [_model_body(info) for info in self._handler.list_models()]}
        )

    async def model(self, request: Request) -> ASGIApp:
        """GET /v1/models/{name}; names may hold slashes."""
        return _json(_model_body(self._info(request.path_params["name"])))

    async def health(self, request: Request) -> ASGIApp:
        """GET /healthz: this process answers."""
        return _json({"status": "ok"})

    async def ready(self, request: Request) -> ASGIApp:
        """GET /readyz: every model can take requests."""
        if self._handler.ready():
            return _json({"status": "ready"})
        return _json({"status": "starting"}, status=503, headers={"retry-after": "1"})

    async def metrics(self, request: Request) -> ASGIApp:
        """GET /metrics, in Prometheus' text form."""
        return Response(
            generate_latest(self._metrics), headers={"content-type": CONTENT_TYPE_LATEST}
        )

    async def _body(self, request: Request) -> dict[str, Any]:
        return await read_json_object(request, self._http_limits)

    async def _generate(
        self, request: Request, job: GenerationJob, make: _ShapeMaker, names: dict[str, str]
    ) -> ASGIApp:
        with names_on_the_wire(names):
            return await while_connected(request.receive, self._start(job, make))

    async def _start(self, job: GenerationJob, make: _ShapeMaker) -> ASGIApp:
        """Everything up to the first byte: the whole answer, or a stream's first event."""
        source = await start_generations(self._handler, job)
        options = ShapeOptions(
            logprobs=job.wants_logprobs,
            prompt_logprobs=job.wants_prompt_logprobs,
            echo=job.echo,
            include_usage=job.include_usage,
        )
        shape = make(source.first, options)
        if job.stream:
            return await open_event_stream(source, shape)
        return _json(await _whole_answer(source, shape), headers=source.tier)

    def _info(self, name: str) -> ModelInfo:
        for info in self._handler.list_models():
            if info.name == name:
                return info
        raise UnknownModelError(f"Model '{check.shown(name)}' is not served here.", param="model")


async def _whole_answer(source: PieceSource, shape: AnswerShape) -> dict[str, Any]:
    choices = [WholeChoice(index=index) for index in range(source.num_choices)]
    try:
        async for piece in source:
            choices[piece.index].add(piece)
    finally:
        await source.aclose()
    return shape.whole(choices, source.usage)


def _json(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(json_bytes(value), status, headers, media_type="application/json")


def _peer(request: Request) -> str:
    return request.client.host if request.client is not None else ""


def _model_body(info: ModelInfo) -> dict[str, Any]:
    return {
        "id": info.name,
        "object": "model",
        "created": info.created,
        "owned_by": "penstock",
        "root": info.name,
        "parent": None,
        "max_model_len": info.max_context,
        "family": info.family,
        "engine": info.engine,
        "ready_replicas": info.ready_replicas,
        "replicas": info.replicas,
    }
