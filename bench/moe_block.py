"""A mixture block on the CPU, bf16, beside the implementations that transformers has of it.

    python -m bench.moe_block [--tokens 1 16 128] [--rounds 3]

Router, experts and weighted sum of one layer, with the same seeded weights in all of them; outputs
are compared first. Several layers take turns, so that weights come from memory; engines take turns
within a round. `one by one` is ours without the call that computes all experts together.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from bench.report import Row, Samples, compared, measured, not_measured, write_report
from cluster.base.env import default_cache_dir
from cluster.dist.communicator import SingleRank
from moe.block import ROUTER, BlockParts, MixtureBlock
from moe.experts import DOWN, UP, GroupedExperts, Tensors
from moe.layout import AllHere
from moe.spec import GateSpec, MoeSpec
from replicas.kernels.ops import Kernels
from replicas.kernels.select import select_kernels
from replicas.layers.mixture import ExpertUnits, KernelMath
from replicas.layers.weights import ResidentWeights

TOKENS = (1, 4, 16, 32, 64, 128, 512, 2048)
THEIRS = ("eager", "grouped_mm", "batched_mm")
COPY_LIMIT_BYTES = 1 << 29
TURN_S = 0.12
Forward = Callable[[torch.Tensor, int], torch.Tensor]
"""Rows (T, D) through the layer of that number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Experts of a layer, and how many layers take turns."""

    experts: int
    top_k: int
    dim: int
    ffn: int
    layers: int

    @property
    def name(self) -> str:
        """As it stands in the table."""
        return f"{self.experts} experts top-{self.top_k} {self.dim}x{self.ffn}"

    @property
    def spec(self) -> MoeSpec:
        """Qwen3-MoE's router."""
        gate = GateSpec(num_experts=self.experts, top_k=self.top_k, normalise=True)
        return MoeSpec(gate=gate, ffn_dim=self.ffn)

    def copied_bytes(self, tokens: int) -> int:
        """What an implementation copies that gathers every token's weights."""
        return tokens * self.top_k * 3 * self.dim * self.ffn * 2

    def target(self, tokens: int) -> float:
        """The ratio to reach against each of the others."""
        return 1.3 if self.experts == 64 and 16 <= tokens <= 128 else 1.0


SHAPES = (
    Shape(experts=64, top_k=8, dim=1024, ffn=512, layers=2),
    Shape(experts=8, top_k=2, dim=768, ffn=2048, layers=4),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWeights:
    """One layer's weights as transformers stores them."""

    router_ED: torch.Tensor
    up_EFD: torch.Tensor
    down_EDF: torch.Tensor


class OneByOne(KernelMath):
    """Our math without the grouped call."""

    def grouped(
        self, experts: Sequence[Tensors], held: Sequence[int], *, down_bias: bool
    ) -> GroupedExperts | None:
        """Never."""
        return None


def main() -> None:
    """Measure, print and write bench/results/moe_block.json."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    kernels = select_kernels("auto", torch.bfloat16, "cpu", default_cache_dir() / "kernels")
    rows: list[Row] = []
    with torch.inference_mode():
        for shape in SHAPES:
            engines = _engines(shape, kernels)
            for tokens in options.tokens:
                rows += case_rows(shape, tokens, engines, options.rounds)
    write_report(
        "moe_block",
        rows,
        notes=(
            f"bf16, {options.threads} threads, kernels: {kernels.name}; router, experts and sum of "
            "one layer; seeded weights of several layers in turn, random rows",
            "one by one: our kernels without the call that takes all experts of a layer",
        ),
    )


def case_rows(
    shape: Shape, tokens: int, engines: Mapping[str, Forward], rounds: int
) -> Iterator[Row]:
    """All engines on one number of tokens."""
    case = f"{shape.name}, {tokens} tokens"
    hidden_TD = torch.randn(
        (tokens, shape.dim), generator=torch.Generator().manual_seed(tokens)
    ).bfloat16()
    too_big = shape.copied_bytes(tokens) > COPY_LIMIT_BYTES
    running = {
        name: forward for name, forward in engines.items() if not (too_big and name == "batched_mm")
    }
    _check_outputs(running, hidden_TD)
    samples: dict[str, list[float]] = {name: [] for name in running}
    for _ in range(rounds):
        for name, forward in running.items():
            samples[name].append(_turn_ms(forward, hidden_TD, shape.layers))
    ours = measured(case, "block", "ms", _samples(samples["ours"]))
    for name in engines:
        target = shape.target(tokens) if name in THEIRS else None
        if name == "ours":
            continue
        if name in running:
            theirs = _samples(samples[name])
            yield compared(ours, name, theirs, target=target, lower_is_better=True)
        else:
            gib = shape.copied_bytes(tokens) / 2**30
            yield not_measured(ours, name, f"it copies {gib:.2g} GiB of weights")


def _engines(shape: Shape, kernels: Kernels) -> dict[str, Forward]:
    layers = [_layer_weights(shape, seed) for seed in range(shape.layers)]
    engines = {
        "ours": _our_blocks(shape, KernelMath(kernels, shape.spec, "silu"), kernels, layers),
        "one by one": _our_blocks(shape, OneByOne(kernels, shape.spec, "silu"), kernels, layers),
    }
    return engines | {name: _their_blocks(shape, name, layers) for name in THEIRS}


def _layer_weights(shape: Shape, seed: int) -> LayerWeights:
    generator = torch.Generator().manual_seed(seed)

    def draw(*sizes: int) -> torch.Tensor:
        scale: float = sizes[-1] ** -0.5
        return (torch.randn(sizes, generator=generator) * scale).bfloat16()

    return LayerWeights(
        router_ED=draw(shape.experts, shape.dim),
        up_EFD=draw(shape.experts, 2 * shape.ffn, shape.dim),
        down_EDF=draw(shape.experts, shape.dim, shape.ffn),
    )


def _our_blocks(
    shape: Shape, math: KernelMath, kernels: Kernels, layers: Sequence[LayerWeights]
) -> Forward:
    parts = BlockParts(
        layer=0,
        layout=AllHere({0: shape.experts}),
        math=math,
        communicator=SingleRank(),
        sliced=True,
    )
    blocks = [MixtureBlock(shape.spec, parts) for _ in layers]
    routers = [kernels.pack(ROUTER, layer.router_ED) for layer in layers]
    homes = [
        ResidentWeights(
            {
                f"layer.0.expert.{expert}": kernels.pack(UP, layer.up_EFD[expert])
                | kernels.pack(DOWN, layer.down_EDF[expert])
                for expert in range(shape.experts)
            }
        )
        for layer in layers
    ]

    def forward(hidden_TD: torch.Tensor, layer: int) -> torch.Tensor:
        return blocks[layer].forward(hidden_TD, routers[layer], ExpertUnits(homes[layer], 0))

    return forward


def _their_blocks(shape: Shape, name: str, layers: Sequence[LayerWeights]) -> Forward:
    config = Qwen3MoeConfig(
        hidden_size=shape.dim,
        moe_intermediate_size=shape.ffn,
        num_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
        norm_topk_prob=True,
    )
    config._experts_implementation = name
    blocks = []
    for layer in layers:
        with torch.device("meta"):
            block = Qwen3MoeSparseMoeBlock(config)
        block.gate.weight = torch.nn.Parameter(layer.router_ED)
        block.experts.gate_up_proj = torch.nn.Parameter(layer.up_EFD)
        block.experts.down_proj = torch.nn.Parameter(layer.down_EDF)
        blocks.append(block.eval())

    def forward(hidden_TD: torch.Tensor, layer: int) -> torch.Tensor:
        output: torch.Tensor = blocks[layer](hidden_TD[None])[0]
        return output

    return forward


def _check_outputs(engines: Mapping[str, Forward], hidden_TD: torch.Tensor) -> None:
    """All compute the same layer, up to bf16; one token may be sent elsewhere where scores tie."""
    expected_TD = engines["eager"](hidden_TD, 0).float()
    for name, forward in engines.items():
        error_T = (forward(hidden_TD, 0).float() - expected_TD).norm(dim=1)
        ratio = statistics.median((error_T / expected_TD.norm(dim=1)).tolist())
        if not ratio < 0.02:
            raise SystemExit(f"{name} computes another layer: {ratio:.1%} from eager's")


def _turn_ms(forward: Forward, hidden_TD: torch.Tensor, layers: int) -> float:
    """Median time of a call, over calls of at least `TURN_S` together and every layer twice."""
    for layer in range(layers):
        forward(hidden_TD, layer)
    taken: list[float] = []
    while len(taken) < 2 * layers or sum(taken) < TURN_S * 1e3:
        started_s = time.perf_counter()
        forward(hidden_TD, len(taken) % layers)
        taken.append((time.perf_counter() - started_s) * 1e3)
    return statistics.median(taken)


def _samples(values: list[float]) -> Samples:
    return Samples(values=tuple(values))


if __name__ == "__main__":
    main()
