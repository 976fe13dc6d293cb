"""What the user writes: the cluster file as frozen pydantic models, one field per key.

Every field says what it means (`description`, printed in docs/cluster-yaml.md) and carries the
rule that accepts or refuses its value. Nothing is decided here: `auto` stays `auto` until the
planner resolves it. Checks across keys: `cluster/base/findings.py`.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from cluster.base.engine_spec import (
    EngineLimitsSpec,
    KvCacheSpec,
    OverflowSpec,
    ResourcesSpec,
    SpeculationSpec,
)
from cluster.base.front_spec import DashboardSpec, GatewaySpec, IdentitySpec
from cluster.base.moe_spec import MoeSectionSpec
from cluster.base.offload_spec import OffloadSpec
from cluster.base.quantities import Whole
from cluster.base.rules import Choice, Text
from cluster.base.section import Auto, Section

_REPO = r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*"
_REVISION = r"[A-Za-z0-9][A-Za-z0-9._/-]*"


class ParallelSpec(Section):
    """How one replica is split over ranks."""

    later_keys: ClassVar[dict[str, str]] = {
        "pp": "pipeline parallelism is not available; tp, dp and ep are",
    }

    tp: Annotated[int, Whole(1, 64)] = Field(
        default=1,
        description="Tensor-parallel ranks: every rank holds a slice of every layer. Must divide "
        "the attention heads and the feed-forward width.",
    )
    dp: Annotated[int, Whole(1, 256)] = Field(
        default=1,
        description="Groups of `tp` ranks that attend to different requests, each with its own "
        "cache, and share the experts of a mixture-of-experts model. With engine: offload they are "
        "on one node, read all but their experts together and hold it once. For a dense model use "
        "`replicas`.",
    )
    ep: Annotated[int | Auto, Whole(1, 1024, auto=True)] = Field(
        default="auto",
        description="Ranks that share the experts, each whole: all dp x tp of them, or 1, which "
        "slices every expert over the tp ranks (only with dp 1). auto: dp x tp when dp is more "
        "than 1 or `engine` is expert_parallel, else 1.",
    )


class ModelSpec(Section):
    """One served model and its replicas."""

    name: Annotated[
        str,
        Text("letters, digits, `.`, `_` and `-`", r"[A-Za-z0-9][A-Za-z0-9._-]*", 64),
    ] = Field(description="The name clients ask for. Unique in the file.")
    path: Annotated[str | None, Text("a directory", r".+", 4096)] = Field(
        default=None,
        description="Directory of the checkpoint (config.json, *.safetensors, tokenizer.json), "
        "relative to this file. Exactly one of `path` and `repo` is needed.",
    )
    repo: Annotated[str | None, Text("a model repository such as org/name", _REPO, 200)] = Field(
        default=None,
        description="Hugging Face model repository, taken from the local cache or downloaded.",
    )
    revision: Annotated[str | None, Text("a branch, tag or commit", _REVISION, 128)] = Field(
        default=None, description="Branch, tag or commit of `repo`. Default: its main one."
    )
    engine: Annotated[
        Literal["auto", "tensor_parallel", "expert_parallel", "offload"],
        Choice(("auto", "tensor_parallel", "expert_parallel", "offload")),
    ] = Field(
        default="auto",
        description="Kind of engine replica. offload: weights are streamed from disk or host "
        "memory, for models larger than the device. auto: expert_parallel when `parallel` spreads "
        "the experts of a model over ranks (dp or ep above 1), else tensor_parallel when the model "
        "fits, else offload.",
    )
    tool_call_parser: Annotated[
        Literal["auto", "hermes", "llama3_json", "mistral"],
        Choice(("auto", "hermes", "llama3_json", "mistral")),
    ] = Field(
        default="auto",
        description="How the model writes tool calls, by the name of vLLM's parser. auto: as its "
        "chat template shows; where that is none of these, tools need `tool_choice`.",
    )
    replicas: Annotated[int, Whole(1, 256)] = Field(
        default=1, description="Independent copies of the model."
    )
    parallel: ParallelSpec = Field(
        default=ParallelSpec(), description="How one replica is split over ranks."
    )
    moe: MoeSectionSpec | None = Field(
        default=None,
        description="How the ranks of an expert-parallel replica exchange tokens; refused for "
        "other replicas.",
    )
    device: Annotated[Literal["auto", "cpu", "cuda"], Choice(("auto", "cpu", "cuda"))] = Field(
        default="auto",
        description="Where ranks run. auto: cuda when there are enough GPUs, else cpu.",
    )
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        Choice(("auto", "float32", "bfloat16", "float16")),
    ] = Field(
        default="auto",
        description="Number format of weights and cache. auto: the checkpoint's own on cuda; on "
        "cpu float32 when that fits comfortably, else the checkpoint's own.",
    )
    quantization: Annotated[Literal["none", "fp8"], Choice(("none", "fp8"))] = Field(
        default="none",
        description="Number format of resident linear weights. fp8: e4m3 with a scale per output "
        "feature, inputs quantised row by row; half the bytes, answers change slightly. Dense "
        "models on cuda (architecture 8.9 or newer) only; streamed weights have "
        "`offload.precision`.",
    )
    kernels: Annotated[Literal["auto", "native", "torch"], Choice(("auto", "native", "torch"))] = (
        Field(
            default="auto",
            description="What computes. native: kernels compiled for the processor at first use, "
            "or Triton's on cuda; torch: torch's own. auto: native where they can be, else torch.",
        )
    )
    attention_backend: Annotated[
        Literal["auto", "cpu_paged", "cpu", "triton_paged", "flashinfer", "torch_ref"],
        Choice(("auto", "cpu_paged", "cpu", "triton_paged", "flashinfer", "torch_ref")),
    ] = Field(
        default="auto",
        description="What attends. cpu_paged: the compiled kernels; cpu: torch's fused attention; "
        "triton_paged: on cuda; flashinfer: on cuda where it is installed, prompts by FlashInfer, "
        "whose last bits depend on how they are cut; torch_ref: written out in torch, slow. auto: "
        "the first of these that the model and the device allow, flashinfer excepted.",
    )
    kv_cache: KvCacheSpec = Field(default=KvCacheSpec(), description="The key/value cache.")
    offload: OffloadSpec | None = Field(
        default=None,
        description="How weights are streamed. With `engine: auto`, `device_memory` is also the "
        "size above which the model is streamed.",
    )
    speculation: SpeculationSpec | None = Field(
        default=None,
        description="Speculative decoding. Default: on (`method: ngram`) where weights are "
        "streamed, since a step costs the same with a few tokens more; off elsewhere.",
    )
    limits: EngineLimitsSpec = Field(
        default=EngineLimitsSpec(), description="Limits of the scheduler."
    )
    overflow: OverflowSpec | None = Field(
        default=None,
        description="Where generations go that the replicas cannot take. Default: nowhere, they "
        "are refused.",
    )
    resources: ResourcesSpec = Field(
        default=ResourcesSpec(), description="What each rank takes of its node."
    )


class ClusterSpec(Section):
    """The whole cluster file."""

    cluster: IdentitySpec = Field(
        default=IdentitySpec(), description="Its name, and how its parts leave."
    )
    dashboard: DashboardSpec = Field(default=DashboardSpec(), description="Ray's dashboard.")
    gateway: GatewaySpec = Field(
        default=GatewaySpec(), description="The front that clients talk to."
    )
    models: Annotated[tuple[ModelSpec, ...], Field(min_length=1, max_length=32)] = Field(
        description="The served models, 1 to 32."
    )
