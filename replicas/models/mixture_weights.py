"""Weight units of mixture layers from Hugging Face names: router, shared experts, routed experts.

A routed expert is a unit of its own: what offload streams and rebalancing moves. Families differ in
names (`ExpertNames`); GPT-OSS stacks all experts of a layer in one tensor, gate and up values in
turns. Torch-free; `moe/block.py` and
`moe/experts.py` compute with the local names given here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from moe.spec import MoeSpec
from replicas.layers.shards import (
    Piece,
    Shard,
    column_bias,
    column_weight,
    replicated,
    row_weight,
)
from replicas.layers.weights import Source, TensorSpec, WeightUnit
from replicas.models.arch import ArchConfig

_WHOLE = Shard(rank=0, size=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertNames:
    """What a family calls the parts of a mixture layer, below its `layer`."""

    layer: str = "model.layers.{layer}."
    router: str = "mlp.gate"
    expert: str = "mlp.experts.{expert}"
    """Without a place for the number: the experts are stacked."""
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    shared: str = "mlp.shared_experts"
    shared_gate: str = "mlp.shared_expert_gate"
    coefficient: str = "mlp.coefficient"


_NAMES: Mapping[str, ExpertNames] = {
    "mixtral": ExpertNames(
        router="block_sparse_moe.gate",
        expert="block_sparse_moe.experts.{expert}",
        gate="w1",
        up="w3",
        down="w2",
    ),
    "qwen2_moe": ExpertNames(shared="mlp.shared_expert"),
    "qwen3_moe": ExpertNames(),
    "gpt_oss": ExpertNames(router="mlp.router", expert="mlp.experts"),
    "deepseek_v2": ExpertNames(),
    "deepseek_v3": ExpertNames(),
    # The names of the parameters of deepspeed.moe.layer.MoE, and of Megatron's MLP in it.
    "deepspeed_moe": ExpertNames(
        layer="transformer.h.{layer}.",
        router="mlp.deepspeed_moe.gate.wg",
        expert="mlp.deepspeed_moe.experts.deepspeed_experts.{expert}",
        up="dense_h_to_4h",
        down="dense_4h_to_h",
        shared="mlp.mlp",
    ),
}


def mixture_tensors(arch: ArchConfig, index: int, shard: Shard) -> list[TensorSpec]:
    """What a mixture layer's own unit holds besides attention: router and shared experts."""
    names, moe = _NAMES[arch.family], _moe(arch, index)
    prefix = names.layer.format(layer=index)
    router = f"{prefix}{names.router}"
    specs = [
        replicated("router.weight", f"{router}.weight", (moe.gate.num_experts, arch.model_dim))
    ]
    if moe.gate.logit_bias:
        specs.append(replicated("router.bias", f"{router}.bias", (moe.gate.num_experts,)))
    if moe.gate.selection_bias:
        source = f"{router}.e_score_correction_bias"
        bias = replicated("router.correction", source, (moe.gate.num_experts,))
        # Rounded to the model's dtype it would choose other experts.
        specs.append(dataclasses.replace(bias, dtype="float32"))
    if moe.shared_ffn_dim:
        specs += _mlp(arch, index, f"{prefix}{names.shared}", ("up", moe.shared_ffn_dim), shard)
    if moe.residual:
        source = f"{prefix}{names.coefficient}"
        specs += [
            replicated("coefficient.weight", f"{source}.weight", (2, arch.model_dim)),
            replicated("coefficient.bias", f"{source}.bias", (2,)),
        ]
    if moe.shared_gate:
        source = f"{prefix}{names.shared_gate}.weight"
        specs.append(replicated("shared_gate.weight", source, (1, arch.model_dim)))
    return specs


def add_experts(
    units: tuple[WeightUnit, ...],
    arch: ArchConfig,
    shard: Shard,
    experts: Sequence[Sequence[int]] | None,
) -> tuple[WeightUnit, ...]:
    """The units with those of each layer's routed experts behind their layer.

    Args:
        experts: as in `weight_units`.
    """
    if not arch.has_experts:
        return units
    return tuple(_interleaved(units, arch, shard, experts))


def _interleaved(
    units: tuple[WeightUnit, ...],
    arch: ArchConfig,
    shard: Shard,
    experts: Sequence[Sequence[int]] | None,
) -> Iterator[WeightUnit]:
    layer_of = {f"layer.{index}": index for index in range(arch.num_layers)}
    for unit in units:
        index = layer_of.get(unit.name)
        if index is None or arch.layers[index].moe is None:
            yield unit
            continue
        number = range(_moe(arch, index).gate.num_experts)
        if experts is None:
            yield unit
            yield from (_expert(arch, index, expert, shard) for expert in number)
            continue
        held = sorted(experts[index])
        elsewhere = [expert_unit(arch, index, expert) for expert in number if expert not in held]
        yield WeightUnit(name=unit.name, tensors=unit.tensors, unused=_stored_names(elsewhere))
        yield from (expert_unit(arch, index, expert) for expert in held)


def expert_unit(arch: ArchConfig, index: int, expert: int) -> WeightUnit:
    """One routed expert of layer `index`, whole: its unit wherever it is."""
    return _expert(arch, index, expert, _WHOLE)


def _expert(arch: ArchConfig, index: int, expert: int, shard: Shard) -> WeightUnit:
    names, moe = _NAMES[arch.family], _moe(arch, index)
    if "{expert}" not in names.expert:
        return _stacked_expert(arch, index, expert, shard)
    prefix = names.layer.format(layer=index) + names.expert.format(expert=expert)
    return WeightUnit(
        name=f"layer.{index}.expert.{expert}",
        tensors=tuple(_mlp(arch, index, prefix, ("gate_up", moe.ffn_dim), shard)),
    )


def _mlp(
    arch: ArchConfig, index: int, prefix: str, up: tuple[str, int], shard: Shard
) -> list[TensorSpec]:
    """An expert or the shared MLP; `up` is the local name of its first linear and the width."""
    names, moe, (local, ffn_dim) = _NAMES[arch.family], _moe(arch, index), up
    parts = (names.gate, names.up) if moe.gated else (names.up,)
    pieces = tuple(Piece(name=f"{prefix}.{part}", out_features=ffn_dim) for part in parts)
    down = f"{prefix}.{names.down}"
    out = (arch.model_dim, ffn_dim)
    specs = [
        column_weight(local, pieces, arch.model_dim, shard, transposed=False),
        row_weight("down", down, out, shard, transposed=False),
    ]
    if moe.expert_bias:
        specs += [
            column_bias(local, pieces, shard),
            replicated("down.bias", f"{down}.bias", (arch.model_dim,)),
        ]
    return specs


def _stacked_expert(arch: ArchConfig, index: int, expert: int, shard: Shard) -> WeightUnit:
    """One of a stack: (E, D, 2F) with gate and up values in turns, (E, F, D), and biases."""
    names, moe, dim = _NAMES[arch.family], _moe(arch, index), arch.model_dim
    prefix, number = names.layer.format(layer=index) + names.expert, moe.gate.num_experts
    start, stop = shard.span(moe.ffn_dim)

    def turns(name: str, axis: int, *, transpose: bool) -> tuple[Source, ...]:
        return tuple(
            Source(
                name=name,
                index=expert,
                dim=axis,
                start=2 * start + odd,
                stop=2 * stop,
                step=2,
                transpose=transpose,
            )
            for odd in range(2)
        )

    up, down = f"{prefix}.gate_up_proj", f"{prefix}.down_proj"
    width = stop - start
    return WeightUnit(
        name=f"layer.{index}.expert.{expert}",
        tensors=(
            TensorSpec(
                name="gate_up.weight",
                shape=(2 * width, dim),
                sources=turns(up, 1, transpose=True),
                full_shapes=((number, dim, 2 * moe.ffn_dim),) * 2,
            ),
            TensorSpec(
                name="gate_up.bias",
                shape=(2 * width,),
                sources=turns(f"{up}_bias", 0, transpose=False),
                full_shapes=((number, 2 * moe.ffn_dim),) * 2,
            ),
            TensorSpec(
                name="down.weight",
                shape=(dim, width),
                sources=(Source(name=down, index=expert, start=start, stop=stop, transpose=True),),
                full_shapes=((number, moe.ffn_dim, dim),),
            ),
            TensorSpec(
                name="down.bias",
                shape=(dim,),
                sources=(Source(name=f"{down}_bias", index=expert),),
                full_shapes=((number, dim),),
            ),
        ),
    )


def _stored_names(units: Sequence[WeightUnit]) -> tuple[str, ...]:
    return tuple(source.name for unit in units for spec in unit.tensors for source in spec.sources)


def _moe(arch: ArchConfig, index: int) -> MoeSpec:
    moe = arch.layers[index].moe
    assert moe is not None
    return moe
