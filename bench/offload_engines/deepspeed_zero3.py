"""DeepSpeed's ZeRO-3 inference engine over transformers' model, parameters on NVMe.

Its asynchronous I/O is the build that `make ops` made, so nothing is compiled here, and the shared
memory operation that it would compile for a group of one process is declared absent.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.initialization import no_init_weights

from bench.offload_child import ChildTask, Engine
from bench.offload_engines.hugging_face import generate
from cluster.base.env import default_cache_dir
from offload.readers.aio_build import find_ops


@contextmanager
def opened(task: ChildTask) -> Iterator[Engine]:
    """The engine with every parameter on disk; it writes them anew at each start."""
    torch.set_num_threads(task.threads)
    _prepare()
    folder = Path(task.folder) / "deepspeed"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    settings = _settings(folder, Path(task.checkpoint))
    auto: Any = AutoModelForCausalLM
    config = AutoConfig.from_pretrained(task.checkpoint)
    with (
        no_init_weights(),
        deepspeed.zero.Init(config_dict_or_path=settings, dtype=torch.bfloat16),
    ):
        model = auto.from_config(config, dtype=torch.bfloat16).eval()
    with safe_open(str(Path(task.checkpoint) / "model.safetensors"), framework="pt") as stored:
        # One at a time: transformers' own loader keeps more than the limit in memory.
        for name, parameter in model.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0), torch.no_grad():
                parameter.copy_(stored.get_tensor(name))
    engine = deepspeed.initialize(model=model, config=settings)[0]
    engine.module.eval()
    yield Engine(generate=partial(generate, engine.module))


def _prepare() -> None:
    module: Any = None
    for name, path in find_ops(default_cache_dir()).items():
        ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)  # the second needs the first's symbols
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    builder = get_accelerator().get_op_builder("AsyncIOBuilder")
    builder.load = lambda self, verbose=True: module
    builder.is_compatible = lambda self, verbose=False: True
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK="0", WORLD_SIZE="1", LOCAL_RANK="0"
    )
    deepspeed.init_distributed(dist_backend="gloo")


def _settings(folder: Path, checkpoint: Path) -> dict[str, Any]:
    config = AutoConfig.from_pretrained(checkpoint)
    shapes = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    largest = max(
        shapes["intermediate_size"] * shapes["hidden_size"],
        shapes["vocab_size"] * shapes["hidden_size"],
    )
    layer = 4 * config.hidden_size * config.hidden_size + 3 * config.hidden_size * (
        config.intermediate_size
    )
    return {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "zero_optimization": {
            "stage": 3,
            "stage3_prefetch_bucket_size": layer,
            "stage3_max_live_parameters": layer,
            "stage3_max_reuse_distance": 0,
            "stage3_param_persistence_threshold": 10_000,
            "offload_param": {
                "device": "nvme",
                "nvme_path": str(folder),
                "pin_memory": False,
                "buffer_count": 5,
                "buffer_size": largest,
            },
        },
        "aio": {
            "block_size": 1 << 20,
            "queue_depth": 32,
            "thread_count": 1,
            "single_submit": False,
            "overlap_events": True,
        },
        "steps_per_print": 10**9,
    }
