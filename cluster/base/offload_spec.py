"""The cluster file's section on streamed weights.

Part of the spec: see `spec.py`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from cluster.base.quantities import Size, Whole
from cluster.base.rules import Choice, Flag, Text
from cluster.base.section import Auto, Section

KIB, TIB = 2**10, 2**40


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
