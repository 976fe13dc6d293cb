"""A deterministic `Handler` with the real validator and a real tokenizer, without any engine.

Every choice says the words of SCRIPT, one per piece. Failures, delays and closes are scripted and
counted, so that tests can see what the front did.
"""

import asyncio
import json
import time
from dataclasses import dataclass, field
from pathlib import Path

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from cluster.base.front_plan import GatewayPlan, LimitsPlan
from cluster.base.plan import EngineKind, KvPlan, MemoryPlan, ModelPlan, SchedulerPlan
from replicas.api import FinishReason
from router.api import (
    EmbedOutput,
    Generation,
    ModelInfo,
    Piece,
    TokenScore,
    TopToken,
    Usage,
)
from router.checked_requests import Prompt
from router.prompt_checks import token_ids as token_ids_of
from router.served_model import ServedModel
from router.validate import Validator

SCRIPT = ("Hello", " w\u00f6rld", " \U0001f600", " line\u2028break", ' "quoted"\n', " end")
MODEL = "tiny/model"
FLOOD_BYTES = 65_536
CHAT_TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"


def limits_plan() -> LimitsPlan:
    return LimitsPlan(
        max_active_requests=64,
        max_prompt_tokens_waiting=100_000,
        max_message_bytes=4 << 20,
        max_choices=8,
        max_prompts_per_request=64,
        max_stop_strings=4,
        max_logprobs=20,
        max_logit_bias=300,
        default_timeout_s=0.0,
        stream_buffer_events=64,
    )


def gateway_plan() -> GatewayPlan:
    return GatewayPlan(host="127.0.0.1", grpc_port=0, http_port=0, replicas=1, limits=limits_plan())


def write_checkpoint(directory: Path) -> Path:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|end|>"])
    backend.save(str(directory / "tokenizer.json"))
    config = {"eos_token": "<|end|>", "chat_template": CHAT_TEMPLATE}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def model_plan(path: Path) -> ModelPlan:
    return ModelPlan(
        name=MODEL,
        path=str(path),
        source=str(path),
        family="llama",
        engine=EngineKind.TENSOR_PARALLEL,
        replicas=1,
        tp_size=1,
        device="cpu",
        dtype="float32",
        num_threads=1,
        cpus_per_rank=1.0,
        gpus_per_rank=0.0,
        vocab_size=257,
        eos_token_ids=(256,),
        kv=KvPlan(
            block_size=16,
            num_blocks=128,
            dtype="float32",
            bytes_per_rank=1,
            prefix_caching=True,
        ),
        scheduler=SchedulerPlan(
            max_running_requests=8,
            max_step_tokens=512,
            max_context=2048,
            max_waiting_requests=64,
            step_timeout_s=5.0,
        ),
        memory=MemoryPlan(weights_bytes=1, kv_bytes=1, workspace_bytes=1, available_bytes=4),
    )


class CountedPieces:
    """An iterator that counts in its handler when it was closed, read or not."""

    def __init__(self, handler, pieces):
        self._handler, self._pieces, self._closed = handler, pieces, False

    def __aiter__(self):
        return self

    async def __anext__(self):
        return await self._pieces.__anext__()

    async def aclose(self):
        if not self._closed:
            self._closed = True
            self._handler.closed += 1
            await self._pieces.aclose()


@dataclass
class ScriptedHandler:
    """Implements `router.api.Handler`."""

    model: ServedModel
    refuse_with: Exception | None = None
    fail_after: int | None = None
    fail_with: Exception | None = None
    delay_s: float = 0.0
    endless: bool = False
    flood: bool = False
    flooded: int = 0
    is_ready: bool = True
    requests: list = field(default_factory=list)
    opened: int = 0
    closed: int = 0

    @classmethod
    def from_directory(cls, path: Path) -> "ScriptedHandler":
        return cls(ServedModel.from_plan(model_plan(write_checkpoint(path))))

    def __post_init__(self):
        self.validator = Validator({MODEL: self.model}, limits_plan(), draw_seed=lambda: 7)

    async def generate(self, request):
        checked = self.validator.check_generation(request)
        prompt_ids = self._encode(checked.prompt)
        built = self.validator.build_generation(checked, prompt_ids)
        if self.refuse_with is not None:
            raise self.refuse_with
        self.requests.append(built)
        self.opened += 1
        echoed = self.model.tokenizer.decode(prompt_ids) if checked.echo else ""
        return Generation(
            request_id=checked.request_id,
            model=MODEL,
            created=1_700_000_000,
            pieces=CountedPieces(self, self._pieces(built, echoed)),
        )

    async def _pieces(self, request, echoed):
        params = request.params
        words = SCRIPT[: params.max_tokens]
        total = 0
        for index in range(params.n):
            prompt_scores = self._prompt_scores(request)
            if echoed or prompt_scores:
                yield Piece(index=index, text=echoed, prompt_logprobs=prompt_scores)
            for at, word in enumerate(words):
                if self.fail_after is not None and total == self.fail_after:
                    raise self.fail_with
                await asyncio.sleep(self.delay_s)
                total += 1
                yield Piece(
                    index=index, text=word, token_ids=(at,), logprobs=_scores(params, at, word)
                )
            while self.flood:
                self.flooded += 1
                await asyncio.sleep(0)
                yield Piece(index=index, text="x" * FLOOD_BYTES)
            while self.endless:
                await asyncio.sleep(0.005)
                yield Piece(index=index, text="more ")
            full = len(words) == len(SCRIPT)
            yield Piece(
                index=index,
                finish_reason=FinishReason.STOP if full else FinishReason.LENGTH,
                stop_reason="<|end|>" if full else "",
                usage=self._usage(request, total) if index == params.n - 1 else None,
            )

    def _usage(self, request, total):
        return Usage(
            prompt_tokens=len(request.prompt_token_ids), completion_tokens=total, cached_tokens=1
        )

    def _prompt_scores(self, request):
        if request.params.prompt_logprobs is None:
            return ()
        texts = [self.model.tokenizer.token_text(i) for i in request.prompt_token_ids]
        first = TokenScore(token_id=request.prompt_token_ids[0], text=texts[0], logprob=None)
        rest = [
            TokenScore(token_id=i, text=text, logprob=-1.5, rank=2, top=_top(1))
            for i, text in zip(request.prompt_token_ids[1:], texts[1:], strict=True)
        ]
        return (first, *rest)

    def _encode(self, prompt: Prompt):
        if prompt.token_ids is not None:
            return prompt.token_ids
        if prompt.text is not None:
            return self.model.tokenizer.encode(prompt.text)
        return self.model.encode_chat(prompt.messages)

    async def embed(self, request):
        checked = self.validator.check_embed(request)
        if self.refuse_with is not None:
            raise self.refuse_with
        await asyncio.sleep(self.delay_s)
        lengths = [len(self._encode(prompt)) for prompt in checked.inputs]
        size = checked.dimensions or 4
        return EmbedOutput(
            request_id=checked.request_id,
            vectors=tuple(tuple(n + k / 8 for k in range(size)) for n in lengths),
            usage=Usage(prompt_tokens=sum(lengths)),
        )

    async def score(self, request):
        raise NotImplementedError

    async def tokenize(self, model, text, messages, add_special_tokens):
        self.validator.model(model)
        prompt = Prompt(text=text) if messages is None else Prompt(messages=tuple(messages))
        ids = list(self._encode(prompt))
        return ids, [self.model.tokenizer.token_text(i) for i in ids]

    async def detokenize(self, model, token_ids, skip_special):
        served = self.validator.model(model)
        ids = token_ids_of("token_ids", token_ids, served)
        return served.tokenizer.decode(ids, skip_special)

    def list_models(self):
        return [
            ModelInfo(
                name=MODEL,
                family="llama",
                engine="tensor_parallel",
                max_context=2048,
                vocab_size=257,
                ready_replicas=int(self.is_ready),
                replicas=1,
                chat=True,
                created=1_700_000_000,
            )
        ]

    async def cancel(self, request_id):
        return False

    async def status(self):
        return {}

    def ready(self):
        return self.is_ready


def _scores(params, at, word):
    if params.logprobs is None:
        return ()
    top = _top(params.logprobs)
    return (TokenScore(token_id=at, text=word, logprob=-0.25, rank=1, top=top),)


def _top(count):
    return tuple(
        TopToken(token_id=k, logprob=float("-inf") if k == 1 else -1.0 - k, text=f"t{k}")
        for k in range(count)
    )


async def until(condition, seconds=2.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        await asyncio.sleep(0.002)
