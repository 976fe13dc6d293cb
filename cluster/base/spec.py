"""What the user writes: the cluster file as frozen pydantic models, one field per key.

Every field says what it means (`description`, printed in docs/cluster-yaml.md) and carries the
rule that accepts or refuses its value. Nothing is decided here: `auto` stays `auto` until the
planner resolves it. Checks across keys: `cluster/base/findings.py`.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from cluster.base.front_spec import DashboardSpec, GatewaySpec, IdentitySpec
from cluster.base.moe_spec import MoeSectionSpec
from cluster.base.quantities import Duration, Real, Size, Whole
from cluster.base.rules import Choice, Flag, Text
from cluster.base.section import Auto, Section

KIB, MIB, TIB = 2**10, 2**20, 2**40

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


class KvCacheSpec(Section):
    """The paged key/value cache of each replica."""

    memory: Annotated[int | Auto, Size(64 * KIB, 16 * TIB, auto=True)] = Field(
        default="auto",
        description="Cache memory of each rank. auto: a share of what the weights leave, but "
        "no more than `max_running_requests` requests of `max_context` tokens can fill.",
    )
    block_size: Annotated[int, Whole(1, 256)] = Field(
        default=16, description="Tokens per block, the unit of allocation and of prefix sharing."
    )
    prefix_caching: Annotated[bool, Flag()] = Field(
        default=True, description="Reuse the blocks of prompts that start alike."
    )


class EngineLimitsSpec(Section):
    """Limits of each replica's scheduler."""

    max_context: Annotated[int | Auto, Whole(1, 2**27, auto=True)] = Field(
        default="auto",
        description="Longest prompt plus output, in tokens. auto: what the model was made for, "
        "or less when the cache cannot hold it.",
    )
    max_running_requests: Annotated[int, Whole(1, 4096)] = Field(
        default=64,
        description="Requests that one step may advance, in each data-parallel group.",
    )
    max_step_tokens: Annotated[int | Auto, Whole(1, 131_072, auto=True)] = Field(
        default="auto",
        description="Tokens that one step may compute, in each data-parallel group; longer prompts "
        "are computed in pieces. auto: 512; of an offload replica as many as the transfer of the "
        "weights hides.",
    )
    max_waiting_requests: Annotated[int, Whole(1, 65_536)] = Field(
        default=256, description="Requests that may wait in a replica; more are refused (429)."
    )
    step_timeout: Annotated[float, Duration(0.1, 3600)] = Field(
        default=10.0,
        description="A step without an answer for this long means a hung rank; the replica is "
        "then replaced.",
    )
    max_rank_restarts: Annotated[int, Whole(0, 1000)] = Field(
        default=0,
        description="Times in an hour that a replica replaces ranks it has lost and goes on: its "
        "requests wait, and get the tokens they would have got. Beyond that, and with 0, they end "
        "with an error and the replica starts anew.",
    )


class ResourcesSpec(Section):
    """What each rank takes of its node."""

    threads_per_rank: Annotated[int | Auto, Whole(1, 1024, auto=True)] = Field(
        default="auto",
        description="Compute threads of a rank on the CPU. auto: the node's cores divided by "
        "all ranks on it.",
    )
    cpus_per_rank: Annotated[float | Auto, Real(0.01, 1024, auto=True)] = Field(
        default="auto",
        description="Logical CPUs that Ray reserves for a rank; fractions are allowed. auto: the "
        "threads of the rank, or its fair share when the node has fewer cores.",
    )


class OffloadSpec(Section):
    """How an offload replica holds and streams its weights; sizes are per rank.

    The process itself (about 400 MiB on the CPU) is not part of any budget here.
    """

    provider: Annotated[
        Literal["streamed", "deepspeed-zero3", "auto"],
        Choice(("streamed", "deepspeed-zero3", "auto")),
    ] = Field(
        default="streamed",
        description="Who moves the weights. streamed: this engine, for the architectures it knows. "
        "deepspeed-zero3: DeepSpeed's ZeRO-3 under transformers' own model code, for any causal "
        "language model that transformers has; slower, one rank, on the CPU. auto: streamed where "
        "the architecture is known, else deepspeed-zero3.",
    )
    device_memory: Annotated[int | Auto, Size(64 * KIB, 16 * TIB, auto=True)] = Field(
        default="auto",
        description="Memory of the device (on the CPU: of the machine) for resident weights, the "
        "ring, the cache and the computation together. auto: what the device or node leaves.",
    )
    host_memory: Annotated[int | Auto, Size(64 * KIB, 16 * TIB, auto=True)] = Field(
        default="auto",
        description="Host memory beside `device_memory`. On a GPU: for weights that stay there, "
        "pinned, and slots for those on disk; auto: what is useful of what the node leaves. On the "
        "CPU: for the cache (see `kv_home`), and both are the machine's memory, each a bound of "
        "its own; auto: none.",
    )
    kv_home: Annotated[
        Literal["auto", "device", "host", "streamed"],
        Choice(("auto", "device", "host", "streamed")),
    ] = Field(
        default="auto",
        description="Where keys and values are. device: with the weights. host: in `host_memory`, "
        "attended to by the host's cores. streamed: in `host_memory`, and those of a micro-batch "
        "pass through windows in `device_memory`, layer by layer. auto: device, or host where "
        "there is `host_memory` and the objective gains by it. On a GPU always device.",
    )
    disk_path: Annotated[str | Auto, Text("a directory", r".+", 4096)] = Field(
        default="auto",
        description="Directory for the packed weights, relative to this file (`~` is your home), "
        "on a fast local disk. auto: `weights` in the cache directory.",
    )
    pack: Annotated[bool, Flag()] = Field(
        default=True,
        description="Whether weights are packed once, at the first start or by `penstock pack`. "
        "false: they come straight from the checkpoint's files, laid out anew in each step: no "
        "disk space and no wait for packing, but slower steps. Only with native `precision`.",
    )
    precision: Annotated[
        Literal["native", "int8", "int4", "auto"], Choice(("native", "int8", "int4", "auto"))
    ] = Field(
        default="native",
        description="Format of the layers' linear weights. native: the model's dtype, answers "
        "unchanged. int8, int4: half and a quarter of the bytes, other answers. auto: the fastest.",
    )
    compression: Annotated[
        Literal["auto", "none", "lossless"], Choice(("auto", "none", "lossless"))
    ] = Field(
        default="auto",
        description="How packed bfloat16 weights lie on disk. lossless: in about two thirds of "
        "the bytes, brought back bit for bit after each read, so answers are unchanged; takes "
        "about half a core while the disk reads. none: as they are. auto: the faster, by what disk "
        "and cores were measured to do.",
    )
    ring_slots: Annotated[int | Auto, Whole(1, 16, auto=True)] = Field(
        default="auto",
        description="Weight units that are loading, waiting or computing at one time; 1 loads "
        "and computes in turn. auto: 2 to 4, the fastest.",
    )
    micro_batch: Annotated[int | Auto, Whole(1, 131_072, auto=True)] = Field(
        default="auto",
        description="Most tokens of a step that a layer computes at a time: its weights are there "
        "once for all of them, and the computation takes the memory of so many. auto: the whole "
        "step, or as few as leave memory for what serves the objective better.",
    )
    resident: Annotated[int | Auto, Whole(0, 10_000, auto=True)] = Field(
        default="auto",
        description="Layers that stay on the device. auto: what serves the objective best; where "
        "records are compressed, parts of them in place of layers.",
    )
    share_resident: Annotated[
        Literal["auto", "always", "never"], Choice(("auto", "always", "never"))
    ] = Field(
        default="auto",
        description="Whether replicas on one node have one copy of the layers that stay, as pages "
        "of the packed file, counted once. Pages of a file are never huge ones, which costs a "
        "little speed. auto: when several replicas share a node.",
    )
    host_experts: Annotated[
        Literal["auto", "always", "never"], Choice(("auto", "always", "never"))
    ] = Field(
        default="auto",
        description="Whether, beside a GPU, the host's cores compute routed experts that are in "
        "host memory and that few rows visit, where that is sooner than to fetch them; decided "
        "visit by visit from measured speeds. Their last bits may differ from the GPU's, so tokens "
        "may depend on what else runs. auto: where it is predicted to serve the objective; "
        "always: also where not, and refused where there are no such experts.",
    )
    objective: Annotated[Literal["throughput", "latency"], Choice(("throughput", "latency"))] = (
        Field(
            default="throughput",
            description="throughput: most tokens per second of all running requests together. "
            "latency: least time per token of a request that runs alone.",
        )
    )


class SpeculationSpec(Section):
    """Guesses at the next tokens, checked together in one step; answers are the same without."""

    method: Annotated[Literal["ngram", "none"], Choice(("ngram", "none"))] = Field(
        default="ngram",
        description="ngram: what followed the latest tokens where they stood before, in the "
        "prompt or the output (prompt lookup); pays where answers quote their prompt. none: no "
        "guesses.",
    )
    num_speculative_tokens: Annotated[int, Whole(1, 64)] = Field(
        default=16,
        description="Most guessed tokens of a request in a step. Fewer are tried while guesses "
        "come true less often, and none where they hardly do.",
    )
    prompt_lookup_min: Annotated[int, Whole(1, 16)] = Field(
        default=2, description="Tokens that have to be the same for a guess."
    )
    prompt_lookup_max: Annotated[int, Whole(1, 16)] = Field(
        default=4,
        description="Tokens that are compared to choose the best of several places.",
    )


class OverflowSpec(Section):
    """Where generations go that the model's replicas cannot take; the answer's headers say so."""

    to: Annotated[
        str,
        Text("letters, digits, `.`, `_` and `-`", r"[A-Za-z0-9][A-Za-z0-9._-]*", 64),
    ] = Field(
        description="Name of another entry with the same checkpoint, such as one with "
        "`engine: offload` and a longer `max_context`. It gets what is too long for this model, "
        "and what this one's replicas have no room for."
    )
    waiting: Annotated[int | Auto, Whole(1, 65_536, auto=True)] = Field(
        default="auto",
        description="Requests waiting in every replica from which on new ones go over. auto: "
        "`limits.max_waiting_requests`, so only what would be refused.",
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
