"""transformers' fastest plain path on the same model: static cache, decode step compiled."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
from transformers import AutoConfig, AutoModelForCausalLM, StaticCache

from bench.gpu.cases import Case, Lab, Setting
from bench.gpu.engine_cases import rate_fact
from bench.gpu.shapes import SHAPES
from bench.report import Row, Samples, compared, measured
from replicas.models.context import torch_dtype
from replicas.worker.device import synchronize

_WARM_STEPS = 8
_TARGET = 3.0


def peer_cases(setting: Setting) -> list[Case]:
    """One case; compiling 32 layers takes a minute or two."""
    return [Case(name=f"transformers-decode-{setting.peer_batch}", about_s=150.0, run=_decode)]


def _decode(lab: Lab) -> Iterator[Row]:
    setting = lab.setting
    batch = setting.peer_batch
    load = (batch, setting.prompt_tokens, _WARM_STEPS + setting.steps)
    times = decode_step_s(setting.size, torch_dtype(setting.dtype), lab.device, load)
    theirs = Samples(values=tuple(batch / time_s for time_s in times))
    case = f"{setting.size} decode {batch}"
    for label in ("bf16", "fp8"):
        ours = lab.facts.get(rate_fact(label, batch))
        if ours is not None:
            row = measured(f"{case} {label}", "tokens/s", "1/s", Samples(values=(ours,)))
            yield compared(row, "transformers, compiled", theirs, target=_TARGET)
    yield measured(f"{case} transformers, compiled", "tokens/s", "1/s", theirs)


def decode_step_s(
    size: str,
    dtype: torch.dtype,
    device: torch.device,
    load: tuple[int, int, int],
) -> list[float]:
    """Times of greedy decode steps of equal-length requests; compiled on CUDA.

    Args:
        load: requests, prompt tokens of each, decode steps.
    """
    batch, prompt_tokens, steps = load
    shape = dict(SHAPES[size])
    config = AutoConfig.for_model(shape.pop("model_type"), **shape)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
    cache = StaticCache(config=config, max_cache_len=prompt_tokens + steps)
    model.eval()
    step = _step
    if device.type == "cuda":
        step = torch.compile(_step, mode="reduce-overhead", fullgraph=True)
    times = []
    with torch.inference_mode():
        ids = torch.randint(3, config.vocab_size, (batch, prompt_tokens), device=device)
        position = torch.arange(prompt_tokens, device=device)
        token = _step(model, ids, position, cache)
        for index in range(steps):
            position = torch.tensor([prompt_tokens + index], device=device)
            synchronize(device)
            started_s = time.perf_counter()
            # The graph's output lives until its next replay.
            token = step(model, token.clone(), position, cache).clone()
            token.tolist()
            times.append(time.perf_counter() - started_s)
    return times[_WARM_STEPS:]


def _step(
    model: torch.nn.Module, ids: torch.Tensor, position: torch.Tensor, cache: StaticCache
) -> torch.Tensor:
    output = model(
        ids, cache_position=position, past_key_values=cache, use_cache=True, logits_to_keep=1
    )
    token: torch.Tensor = output.logits[:, -1:].argmax(-1)
    return token
