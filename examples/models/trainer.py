"""The training loop: one process, one thread, bf16 autocast over fp32 weights.

State on disk is one safetensors file (weights and both AdamW moments) and one JSON file; batches
depend on the step alone, so a resumed run continues the interrupted one. The loop knows nothing of
publishing: the caller gets a hook after every step.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from examples.models.recipes import Recipe
from examples.models.schedule import Schedule
from examples.models.training_data import BatchSampler

EAGER_ATTENTION_UP_TO = 256
"""Up to this length plain attention beats the fused CPU kernel, whose cost per head is high."""
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(slots=True, kw_only=True)
class Progress:
    """How far a run is; `elapsed_s` adds up over resumed parts."""

    step: int = 0
    elapsed_s: float = 0.0
    loss: float = float("nan")
    """Exponential mean of the training loss in nats per token."""


class Trainer:
    """Trains one model until its schedule is over."""

    def __init__(
        self,
        model: PreTrainedModel,
        sampler: BatchSampler,
        recipe: Recipe,
        schedule: Schedule,
        budget_s: float | None,
    ) -> None:
        self.model = model
        self.schedule = schedule
        self.progress = Progress()
        self.cycles: list[dict[str, int]] = []
        """Finished schedules in order, as the `steps` and `decay_steps` that repeat them."""
        self._sampler = sampler
        self._recipe = recipe
        self._budget_s = budget_s
        self._optimizer = torch.optim.AdamW(
            _parameter_groups(model, recipe.weight_decay), betas=recipe.betas, fused=True
        )

    def run(self, after_step: Callable[[Progress], None]) -> None:
        """Train to the end of the schedule, calling `after_step` outside the clocked time."""
        self.model.train()
        while not self.schedule.is_over(self.progress.step):
            started = time.monotonic()
            loss = self._step(self.progress.step)
            progress = self.progress
            progress.step += 1
            progress.elapsed_s += time.monotonic() - started
            fresh = progress.step == 1
            progress.loss = loss if fresh else 0.98 * progress.loss + 0.02 * loss
            if self._budget_s is not None:
                self.schedule = self.schedule.settled(
                    progress.step, progress.elapsed_s, self._budget_s, self._recipe.decay_share
                )
            after_step(progress)
        self._close_cycle()

    def extend(self, schedule: Schedule) -> None:
        """Go on past a finished schedule: the rate returns to its peak and decays once more.

        Nothing changes while the present schedule is unfinished, or if `schedule` ends no later.
        """
        step = self.progress.step
        if self.schedule.is_over(step) and not schedule.is_over(step):
            self.schedule = schedule

    def _close_cycle(self) -> None:
        steps = self.progress.step
        if not self.cycles or self.cycles[-1]["steps"] < steps:
            self.cycles.append({"steps": steps, "decay_steps": self.schedule.decay_steps})

    def _step(self, step: int) -> float:
        batch_RT = torch.from_numpy(self._sampler.batch(step))
        short = batch_RT.shape[1] <= EAGER_ATTENTION_UP_TO
        self.model.set_attn_implementation("eager" if short else "sdpa")
        for group in self._optimizer.param_groups:
            group["lr"] = self.schedule.learning_rate(step)
        with torch.autocast("cpu", torch.bfloat16):
            output = self.model(input_ids=batch_RT, labels=batch_RT, use_cache=False)
            loss = output.loss + self._imbalance(output)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self._recipe.max_gradient_norm)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return float(output.loss.detach())

    def _imbalance(self, output: Any) -> Tensor | float:
        """Load-balancing loss (Fedus et al. 2021, eq. 4), layer by layer; 0 for a dense model.

        transformers adds up all layers before it compares experts, which lets one layer's idle
        expert hide behind another's busy one.
        """
        layers = getattr(output, "router_logits", None)
        if not layers:
            return 0.0
        config = self.model.config
        losses: list[Any] = [
            load_balancing_loss_func((logits,), config.num_experts, config.num_experts_per_tok)
            for logits in layers
        ]
        return self._recipe.balance_weight * torch.stack(losses).mean()

    def save(self, directory: Path) -> None:
        """Write the resumable state; each file is replaced whole, the JSON last."""
        directory.mkdir(parents=True, exist_ok=True)
        tensors = {
            f"param.{name}": parameter.detach() for name, parameter in self._named_parameters()
        }
        for name, parameter in self._named_parameters():
            state = self._optimizer.state[parameter]
            tensors |= {f"{moment}.{name}": state[moment] for moment in MOMENTS}
        save_file(tensors, directory / "state.tmp")
        os.replace(directory / "state.tmp", directory / "state.safetensors")
        meta = {
            "progress": asdict(self.progress),
            "schedule": asdict(self.schedule),
            "cycles": self.cycles,
        }
        (directory / "state.json.tmp").write_text(json.dumps(meta))
        os.replace(directory / "state.json.tmp", directory / "state.json")

    def load(self, directory: Path) -> None:
        """Continue from what `save` wrote.

        Raises:
            FileNotFoundError: there is no saved state in `directory`.
        """
        meta = json.loads((directory / "state.json").read_text())
        tensors = load_file(directory / "state.safetensors")
        self.progress = Progress(**meta["progress"])
        self.schedule = Schedule(**meta["schedule"])
        self.cycles = meta["cycles"]
        for name, parameter in self._named_parameters():
            parameter.data.copy_(tensors[f"param.{name}"])
            state: dict[str, Tensor] = {
                moment: tensors[f"{moment}.{name}"].clone() for moment in MOMENTS
            }
            state["step"] = torch.tensor(float(self.progress.step))
            self._optimizer.state[parameter] = state

    def _named_parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        return list(self.model.named_parameters())


def _parameter_groups(model: PreTrainedModel, weight_decay: float) -> list[dict[str, object]]:
    """Matrices decay, norm weights do not."""
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
