"""A whole gateway in one process: fake engines, real hop, real handler, real gRPC front."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fake_engine import FakeEngine
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from cluster.base.front_plan import GatewayPlan, LimitsPlan
from cluster.base.plan import EngineKind, KvPlan, MemoryPlan, ModelPlan, SchedulerPlan
from replicas.leader.record import ReplicaRecord, ReplicaState
from replicas.leader.stream_server import ReplicaStreamServer
from router.access.front_access import FrontAccess
from router.directory import ReplicaDirectory
from router.dispatcher import Dispatcher
from router.grpc.server import GrpcFront
from router.handler import GatewayHandler, GatewayIdentity
from router.hop_settings import HopSettings
from router.policies.prefix_affinity import PrefixAffinity
from router.resume import Move
from router.served_model import serve_models

MODEL = "tiny"
VOCAB = 259
BOS, IM_START, IM_END = 256, 257, 258
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LIMITS = LimitsPlan(
    max_active_requests=32,
    max_prompt_tokens_waiting=4096,
    max_message_bytes=4 << 20,
    max_choices=8,
    max_prompts_per_request=64,
    max_stop_strings=4,
    max_logprobs=20,
    max_logit_bias=300,
    default_timeout_s=0.0,
    stream_buffer_events=1024,
)


def write_checkpoint(directory: Path) -> Path:
    """A tokenizer of one token per byte with three control tokens and a ChatML template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: at for at, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|bos|>", "<|im_start|>", "<|im_end|>"])
    directory.mkdir(parents=True, exist_ok=True)
    backend.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "<|im_end|>", "chat_template": CHATML})
    )
    (directory / "config.json").write_text(json.dumps({"eos_token_id": IM_END}))
    return directory


def model_plan(path: Path, **changes) -> ModelPlan:
    plan = ModelPlan(
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
        cpus_per_rank=1,
        gpus_per_rank=0,
        vocab_size=VOCAB,
        eos_token_ids=(IM_END,),
        kv=KvPlan(
            block_size=16, num_blocks=64, dtype="float32", bytes_per_rank=1, prefix_caching=True
        ),
        scheduler=SchedulerPlan(
            max_running_requests=64,
            max_step_tokens=512,
            max_context=1024,
            max_waiting_requests=64,
            step_timeout_s=5.0,
        ),
        memory=MemoryPlan(weights_bytes=1, kv_bytes=1, workspace_bytes=1, available_bytes=9),
    )
    return replace(plan, **changes)


class FakeMembership:
    """A membership source that a test writes to."""

    def __init__(self) -> None:
        self.version = 0
        self.records: list[ReplicaRecord] = []
        self.broken = False
        self._changed = asyncio.Condition()

    async def watch(self, version: int, timeout_s: float) -> tuple[int, list[ReplicaRecord]]:
        if self.broken:
            raise ConnectionError("the directory is gone")
        async with self._changed:
            with suppress(TimeoutError):
                await asyncio.wait_for(
                    self._changed.wait_for(lambda: self.version != version), timeout_s
                )
        if self.broken:
            raise ConnectionError("the directory is gone")
        return self.version, list(self.records)

    async def publish(self, *records: ReplicaRecord) -> None:
        async with self._changed:
            self.records = list(records)
            self.version += 1
            self._changed.notify_all()


@dataclass
class FakeReplica:
    engine: FakeEngine
    server: ReplicaStreamServer
    record: ReplicaRecord

    async def kill(self) -> None:
        """As a killed process looks from outside: the connection is reset."""
        self.engine.stop()
        await self.server.stop()


@asynccontextmanager
async def fake_replica(
    engine: FakeEngine,
    replica_id: str = "r0",
    epoch: str = "e1",
    load_period_s: float = 1.0,
    model: str = MODEL,
) -> AsyncIterator[FakeReplica]:
    server = ReplicaStreamServer(engine, epoch=epoch, load_period_s=load_period_s)
    port = await server.start("127.0.0.1")
    engine.start(server.publish)
    record = ReplicaRecord(
        replica_id=replica_id,
        model=model,
        epoch=epoch,
        state=ReplicaState.READY,
        endpoint=f"127.0.0.1:{port}",
    )
    try:
        yield FakeReplica(engine, server, record)
    finally:
        engine.stop()
        await server.stop()


@dataclass
class Gateway:
    handler: GatewayHandler
    directory: ReplicaDirectory
    membership: FakeMembership
    replicas: list[FakeReplica]
    front: GrpcFront
    target: str
    moves: list[Move]

    @property
    def engine(self) -> FakeEngine:
        return self.replicas[0].engine


@asynccontextmanager
async def running_gateway(
    checkpoint: Path,
    *,
    engines: list[FakeEngine] | None = None,
    hop: HopSettings | None = None,
    plan: ModelPlan | None = None,
    plans: Sequence[ModelPlan] = (),
    front: Mapping[str, Any] = MappingProxyType({}),
    **limits,
) -> AsyncIterator[Gateway]:
    """`plan`: of the one model; `plans`: several, then there is one of `engines` for each.

    `front`: more fields of the gateway's plan.
    """
    plan_limits = replace(LIMITS, **limits)
    if hop is None:
        hop = HopSettings()
    gateway_plan = GatewayPlan(
        host="127.0.0.1", grpc_port=0, http_port=0, replicas=1, limits=plan_limits, **front
    )
    async with AsyncExitStack() as stack:
        replicas = [
            await stack.enter_async_context(
                fake_replica(engine, f"r{at}", model=plans[at].name if plans else MODEL)
            )
            for at, engine in enumerate([FakeEngine()] if engines is None else engines)
        ]
        membership = FakeMembership()
        policy, moves = PrefixAffinity(), list[Move]()
        directory = ReplicaDirectory(membership, gateway_id="gw", hop=hop, on_gone=policy.forget)
        directory.start()
        stack.push_async_callback(directory.close)
        await membership.publish(*(replica.record for replica in replicas))
        handler = GatewayHandler(
            serve_models(plans or (plan or model_plan(checkpoint),)),
            plan_limits,
            directory,
            Dispatcher(directory, policy, plan_limits, moves.append),
            GatewayIdentity(cluster="test", version="0.1.0"),
        )
        server = GrpcFront(handler, gateway_plan, FrontAccess(gateway_plan))
        port = await server.start()
        stack.push_async_callback(server.stop, 0)
        if replicas:
            await until(handler.ready)
        yield Gateway(handler, directory, membership, replicas, server, f"127.0.0.1:{port}", moves)


async def until(condition: Callable[[], bool], timeout_s: float = 5.0) -> None:
    """Wait for a condition; fails the test when it does not come true."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 (any condition, also one that no event announces)
            await asyncio.sleep(0.002)
