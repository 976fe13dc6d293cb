"""Weights streamed from host memory: bytes per second against the link's, and other ways to do it.

The checkpoint is made once per run, in memory-backed storage where there is some. Its layers have
the shape of the 8B model's; only there are fewer of them.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

from bench.gpu.cases import Case, Lab, Setting, one
from bench.gpu.shapes import SHAPES
from bench.offload_child import Generate
from bench.offload_engines.batches import generator_of
from bench.random_checkpoint import RandomCheckpoint, random_checkpoint
from bench.report import Row, Samples, compared, measured, not_measured
from cluster.base.plan import OffloadPlan
from cluster.dist.communicator import SingleRank
from offload.assembly import kernel_adapter, streamed_weights
from offload.layout import read_store
from replicas.worker.assembly import RankSpec, build_runner

_BATCH, _PROMPT_TOKENS, _NEW_TOKENS, _WARM_STEPS = 1, 16, 14, 4
_BLOCK_SIZE = 16
_ROOM = 64 * 2**30
_LINK_TARGET, _INT4_TARGET = 0.95, 3.2


def offload_cases(setting: Setting) -> list[Case]:
    """Ours in bf16 and int4, then Accelerate and DeepSpeed where they are installed."""
    return [
        Case(name="offload-bf16", about_s=60.0, run=lambda lab: _ours(lab, "native")),
        Case(name="offload-int4", about_s=60.0, run=lambda lab: _ours(lab, "int4")),
        Case(
            name="offload-accelerate",
            about_s=25.0,
            run=lambda lab: _theirs(lab, "accelerate", "Accelerate, CPU offload", 3.0),
        ),
        Case(
            name="offload-deepspeed",
            about_s=40.0,
            run=lambda lab: _theirs(lab, "deepspeed", "DeepSpeed ZeRO-3, CPU offload", 1.2),
        ),
    ]


def _ours(lab: Lab, precision: str) -> Iterator[Row]:
    checkpoint = _checkpoint(lab)
    folder = checkpoint.path.parent / precision
    folder.mkdir(exist_ok=True)
    layers = tuple(f"layer.{index}" for index in range(lab.setting.offload_layers))
    on_device = lab.device.type != "cpu"
    plan = OffloadPlan(
        disk_path=str(folder),
        device_bytes=_ROOM,
        host_bytes=_ROOM if on_device else 0,
        workspace_bytes=0,
        resident_units=("embed", "norm", "head"),
        # A CPU rank has one memory: there the layers come from the file.
        host_units=layers if on_device else (),
        precision=precision,
        reader="buffered",
    )
    steps = _measure(lab, _engine(lab, checkpoint, plan))
    (path,) = folder.glob("*.weights")
    store = read_store(path)
    streamed = sum(store.record_of(layer).num_bytes for layer in layers)
    rates = Samples(values=tuple(streamed / step_s for step_s in steps))
    case = f"offload {precision if precision != 'native' else lab.setting.dtype}, batch {_BATCH}"
    row = measured(case, "streamed", "GB/s", _scaled(rates, 1e-9))
    if "link" in lab.facts:
        yield compared(row, "pinned copy", one(lab.facts["link"] / 1e9), target=_LINK_TARGET)
    else:
        yield row
    tokens = Samples(values=tuple(_BATCH / step_s for step_s in steps))
    row = measured(case, "tokens/s", "1/s", tokens)
    if precision == "native":
        lab.facts["offload tokens/s"] = tokens.median
        yield row
    elif "offload tokens/s" in lab.facts:
        whole = one(lab.facts["offload tokens/s"])
        yield compared(row, f"ours in {lab.setting.dtype}", whole, target=_INT4_TARGET)


def _engine(lab: Lab, checkpoint: RandomCheckpoint, plan: OffloadPlan) -> Generate:
    blocks = -(-(_PROMPT_TOKENS + _NEW_TOKENS) // _BLOCK_SIZE)
    spec = RankSpec(
        model_path=str(checkpoint.path),
        dtype=lab.setting.dtype,
        kv_dtype=lab.setting.dtype,
        block_size=_BLOCK_SIZE,
        num_blocks=_BATCH * blocks + 1,
        max_context=blocks * _BLOCK_SIZE,
        kernels="auto" if lab.device.type == "cuda" else "off",
    )
    runner = build_runner(
        spec,
        SingleRank(),
        lab.device,
        weights_factory=streamed_weights(plan),
        adapt_kernels=kernel_adapter(plan),
    )
    return generator_of(runner, spec)


def _theirs(lab: Lab, package: str, name: str, target: float) -> Iterator[Row]:
    if "offload tokens/s" not in lab.facts:
        raise RuntimeError("offload-bf16 gave no number to compare with")
    row = measured(
        f"offload {lab.setting.dtype}, batch {_BATCH}",
        "tokens/s",
        "1/s",
        one(lab.facts["offload tokens/s"]),
    )
    missing = "" if importlib.util.find_spec(package) else f"{package} is not installed"
    if missing or lab.device.type == "cpu":
        yield not_measured(row, name, missing or "only on a GPU", target=target)
        return
    from bench.gpu.offload_peers import accelerate_engine, deepspeed_engine

    make = accelerate_engine if package == "accelerate" else deepspeed_engine
    steps = _measure(lab, make(_checkpoint(lab).path, lab.setting.dtype, lab.device))
    theirs = Samples(values=tuple(_BATCH / step_s for step_s in steps))
    yield compared(row, name, theirs, target=target)


def _measure(lab: Lab, generate: Generate) -> list[float]:
    """Seconds of decode steps, the prompt's and the first few left out."""
    vocab = _shape(lab)["vocab_size"]
    prompts = [
        [3 + (row * 7919 + place * 104729) % (vocab - 3) for place in range(_PROMPT_TOKENS)]
        for row in range(_BATCH)
    ]
    seconds, _ = generate(prompts, _NEW_TOKENS)
    return seconds[1 + _WARM_STEPS :]


def _shape(lab: Lab) -> dict[str, int]:
    shape = dict(SHAPES["tiny" if lab.setting.is_tiny else "8b"])
    return shape | {"num_hidden_layers": lab.setting.offload_layers, "vocab_size": 32000}


def _checkpoint(lab: Lab) -> RandomCheckpoint:
    """Made by the first case that needs it."""
    made = lab.held.get("checkpoint")
    if isinstance(made, RandomCheckpoint):
        return made
    made = random_checkpoint("offload", lab.scratch, config=_shape(lab))
    lab.held["checkpoint"] = made
    return made


def _scaled(samples: Samples, factor: float) -> Samples:
    return Samples(values=tuple(value * factor for value in samples.values))
