"""A mixture layer computed the plain way, token by token and expert by expert, in fp64."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.nn import functional

from moe.experts import GroupedExperts, Made, Make
from moe.gating import route
from moe.spec import GateSpec, MoeSpec


class SiluMath:
    """`ExpertMath` in plain torch."""

    @property
    def on_host(self) -> SiluMath:
        """Torch computes everywhere."""
        return self

    def linear(
        self,
        input_TI: torch.Tensor,
        tensors: Mapping[str, torch.Tensor],
        name: str,
        bias_O: torch.Tensor | None = None,
        *,
        wide: bool = False,
    ) -> torch.Tensor:
        """A linear as products and sums, so that no row leans on another."""
        output = (input_TI[:, None, :] * tensors[name]).sum(dim=-1)
        output = output if bias_O is None else output + bias_O
        return output.float() if wide else output

    def gate(self, gate_up_TF: torch.Tensor) -> torch.Tensor:
        """silu(gate) * up."""
        gate, up = gate_up_TF.chunk(2, dim=-1)
        return functional.silu(gate) * up

    def route(
        self, logits_TE: torch.Tensor, spec: GateSpec, bias_E: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The gate that is tested elsewhere."""
        return route(logits_TE, spec, bias_E)

    def grouped(self, experts: object, held: object, *, down_bias: bool) -> GroupedExperts | None:
        """Never."""
        return None


class HeldExperts:
    """`ExpertWeights` over a dict; notes who was asked for, and refuses to leak."""

    def __init__(self, experts: Mapping[int, Mapping[str, torch.Tensor]]) -> None:
        self._experts = experts
        self.acquired: list[int] = []
        self.open: set[int] = set()

    def acquire(self, expert: int) -> Mapping[str, torch.Tensor]:
        """The expert's tensors."""
        self.acquired.append(expert)
        self.open.add(expert)
        return self._experts[expert]

    def release(self, expert: int) -> None:
        """Back again."""
        self.open.remove(expert)

    def announce(self, experts, rows):
        """All of them are here; taken backwards, which must not matter."""
        return range(len(experts))[::-1]

    def lasting(self, held: tuple[int, ...], make: Make[Made]) -> Made | None:
        """They come and go."""
        return None


def random_experts(
    spec: MoeSpec, dim: int, *, integers: bool = False, seed: int = 0
) -> dict[int, dict[str, torch.Tensor]]:
    """Seeded weights of every expert; with `integers` all sums are exact."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        if integers:
            return torch.randint(-2, 3, shape, generator=generator).float()
        return 0.3 * torch.randn(shape, generator=generator)

    experts = {}
    for expert in range(spec.gate.num_experts):
        experts[expert] = {
            "gate_up.weight": draw(2 * spec.ffn_dim, dim),
            "down.weight": draw(dim, spec.ffn_dim),
        }
        if spec.expert_bias:
            experts[expert] |= {"gate_up.bias": draw(2 * spec.ffn_dim), "down.bias": draw(dim)}
    return experts


def plain_mixture(
    hidden_TD: torch.Tensor,
    logits_TE: torch.Tensor,
    spec: MoeSpec,
    experts: Mapping[int, Mapping[str, torch.Tensor]],
    bias_E: torch.Tensor | None = None,
) -> torch.Tensor:
    """What the routed experts add up to, (T, D) fp64."""
    ids_TK, weights_TK = route(logits_TE, spec.gate, bias_E)
    output = torch.zeros(hidden_TD.shape, dtype=torch.float64)
    for token in range(hidden_TD.shape[0]):
        for expert, weight in zip(ids_TK[token].tolist(), weights_TK[token], strict=True):
            tensors = {name: tensor.double() for name, tensor in experts[expert].items()}
            fused = tensors["gate_up.weight"] @ hidden_TD[token].double()
            gate, up = (fused + tensors.get("gate_up.bias", 0.0)).chunk(2)
            inner = functional.silu(gate) * up
            if spec.glu_limit:
                gate = gate.clamp(max=spec.glu_limit)
                up = up.clamp(-spec.glu_limit, spec.glu_limit)
                inner = (up + 1) * gate * torch.sigmoid(spec.glu_alpha * gate)
            result = tensors["down.weight"] @ inner + tensors.get("down.bias", 0.0)
            output[token] += weight.double() * result
    return output
