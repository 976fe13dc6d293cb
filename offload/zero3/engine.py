"""DeepSpeed's ZeRO-3 inference engine around a model of transformers, in a process of its own.

DeepSpeed fetches a module's parameters before the module runs and frees them after it, from memory
or from files that it writes at every start. What it does to a process that is not prepared is kept
from it here: it would compile a shared-memory operation for a group of one process and its
asynchronous I/O at first use, and delete the folder of any other process that has the same path.
"""

from __future__ import annotations

import importlib
import logging
import shutil
import weakref
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from cluster.base.amount_text import size_text
from cluster.base.errors import ConfigError, CorruptWeightsError
from cluster.base.zero3_plan import Zero3Plan
from cluster.dist.lone_group import ensure_lone_group
from offload.readers.aio import load_ops
from offload.readers.engine import ReaderUnavailableError
from offload.zero3.folders import OwnFolder

_log = logging.getLogger(__name__)
_AIO = {
    "block_size": 1 << 20,
    "queue_depth": 32,
    "thread_count": 1,
    "single_submit": False,
    "overlap_events": True,
}


class Zero3Engine:
    """A model under ZeRO-3's hooks; one of them per process at a time.

    Args:
        model_path: the checkpoint.
        cache_dir: where `make ops` has put DeepSpeed's asynchronous I/O.

    Raises:
        ConfigError: deepspeed or transformers are missing, the disk is too small, or the disk
            tier's reader is not built.
        CorruptWeightsError: transformers finds tensors missing or of other shapes.
    """

    def __init__(
        self, model_path: Path, plan: Zero3Plan, dtype: torch.dtype, cache_dir: Path
    ) -> None:
        deepspeed = _import_deepspeed()
        with ExitStack() as opened:
            folder = _disk_folder(plan, dtype, opened) if plan.tier == "disk" else None
            if folder is not None:
                _lend_reader(deepspeed, cache_dir)
            ensure_lone_group()
            module = _load(model_path, dtype)
            settings = zero3_settings(plan, dtype, folder)
            engine = deepspeed.initialize(model=module, config=settings)[0]
            opened.callback(engine.destroy)
            self._engine: Any = engine
            self.module: Any = engine.module.eval()
            """Callable like the model itself."""
            # Also at an orderly end of the process.
            self._finalizer = weakref.finalize(self, opened.pop_all().close)
        _log.info(
            "%s: %s under ZeRO-3, weights in %s", model_path, type(module).__name__, plan.tier
        )

    def close(self) -> None:
        """Let memory and files go; safe to call twice."""
        self._finalizer()


def zero3_settings(plan: Zero3Plan, dtype: torch.dtype, folder: Path | None) -> dict[str, Any]:
    """DeepSpeed's configuration: every parameter is offloaded, one window of them prefetched."""
    home: dict[str, Any] = {"device": "cpu", "pin_memory": False}
    if folder is not None:
        home = {
            "device": "nvme",
            "nvme_path": str(folder),
            "pin_memory": False,
            "buffer_count": plan.num_buffers,
            "buffer_size": plan.model.largest_values,
        }
    return {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "zero_optimization": {
            "stage": 3,
            "stage3_prefetch_bucket_size": plan.window_values,
            "stage3_max_live_parameters": plan.window_values,
            "stage3_max_reuse_distance": 0,
            "stage3_param_persistence_threshold": 0,
            "offload_param": home,
        },
        "aio": _AIO,
        "steps_per_print": 10**9,
    }


def _import_deepspeed() -> Any:
    try:
        importlib.import_module("transformers")
        deepspeed = importlib.import_module("deepspeed")
    except ImportError as error:
        raise ConfigError(
            f"The provider deepspeed-zero3 cannot start: {error}.",
            "Install it: pip install 'penstock[transformers]'.",
        ) from error
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _disk_folder(plan: Zero3Plan, dtype: torch.dtype, opened: ExitStack) -> Path:
    parent = Path(plan.disk_path) / "zero3"
    try:
        folder = OwnFolder(parent)
    except OSError as error:
        raise ConfigError(
            f"{parent} cannot be written: {error.strerror}.", "Choose another offload.disk_path."
        ) from error
    opened.callback(folder.close)
    need, free = plan.model.num_values * dtype.itemsize, shutil.disk_usage(parent).free
    if need > free:
        raise ConfigError(
            f"ZeRO-3 writes {size_text(need)} of weights and {parent} has {size_text(free)} left.",
            "Free some space, or choose another offload.disk_path.",
        )
    return folder.path


def _lend_reader(deepspeed: Any, cache_dir: Path) -> None:
    """Have DeepSpeed find its asynchronous I/O built, which it would else compile now."""
    try:
        module = load_ops(cache_dir)
    except ReaderUnavailableError as error:
        raise ConfigError(
            f"ZeRO-3 cannot keep weights on disk: {error}.",
            "Run `make ops`, or raise offload.device_memory until the weights fit.",
        ) from error
    builder = deepspeed.accelerator.get_accelerator().get_op_builder("AsyncIOBuilder")
    builder.load = lambda self, verbose=True: module
    builder.is_compatible = lambda self, verbose=False: True


def _load(model_path: Path, dtype: torch.dtype) -> Any:
    """The model with its weights mapped from the checkpoint; ZeRO-3 takes them one by one.

    In the checkpoint's own dtype the mapping is all there is: no second copy is made.
    """
    transformers: Any = importlib.import_module("transformers")
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        model_path,
        dtype=dtype,
        trust_remote_code=False,
        local_files_only=True,
        use_safetensors=True,
        output_loading_info=True,
    )
    for what in ("missing_keys", "mismatched_keys", "error_msgs"):
        if found := report.get(what):
            raise CorruptWeightsError(
                f"{model_path}: {what.replace('_', ' ')} {sorted(map(str, found))[:3]}.",
                "Fetch or export the checkpoint again.",
            )
    return model.eval()
