"""The one place that asks torch about the machine: devices, threads, memory, out-of-memory.

The only user of `torch.cuda`; importable and complete on a machine without CUDA. Which GPU a
worker may see is decided by its environment before the process starts, so the first visible one
is always the right one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from cluster.base.errors import ConfigError, DeviceOutOfMemoryError, InternalError
from replicas.worker.pending_step import Mark

_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
_CGROUP_USED = Path("/sys/fs/cgroup/memory.current")
_MEMINFO = Path("/proc/meminfo")
_CPU_OUT_OF_MEMORY = "can't allocate memory"


def open_device(kind: str, num_threads: int) -> torch.device:
    """Make this process ready to compute on `cpu` or `cuda`.

    Sets the process-wide number of compute threads; at most one device per process.

    Raises:
        ConfigError: an unknown kind, or no CUDA device is visible to this process.
    """
    if kind not in ("cpu", "cuda"):
        raise ConfigError(f"Unknown device {kind!r}.", "Use cpu or cuda.", param="device")
    if num_threads > 0:
        torch.set_num_threads(num_threads)
    if kind == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError(
            "The plan asks for a CUDA device and this process sees none.",
            "Run on a node with a GPU and a CUDA build of torch, or set device: cpu.",
            param="device",
        )
    device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    return device


def available_memory_bytes(device: torch.device) -> int:
    """Memory that this process could still allocate on `device`, in bytes.

    On the CPU: the smaller of what the machine and the container limit leave.
    """
    if device.type == "cuda":
        free_bytes, _total_bytes = torch.cuda.mem_get_info(device)
        return int(free_bytes)
    limits = [_host_available_bytes()]
    if _CGROUP_LIMIT.exists() and _CGROUP_USED.exists():
        limit = _CGROUP_LIMIT.read_text().strip()
        if limit != "max":
            limits.append(max(0, int(limit) - int(_CGROUP_USED.read_text())))
    return min(limits)


def allocated_memory_bytes(device: torch.device) -> int:
    """Bytes this process holds in device tensors; 0 on the CPU, where torch does not count."""
    return int(torch.cuda.memory_allocated(device)) if device.type == "cuda" else 0


def pin_host_memory(memory: torch.Tensor, device: torch.device) -> Callable[[], None]:
    """Let `device` copy from host memory at full speed and in the background; nothing on the CPU.

    torch's own pinned memory comes in powers of two; this pins what is there, at exact size.

    Returns:
        What undoes it; the memory must live until then.

    Raises:
        DeviceOutOfMemoryError: the memory cannot be pinned.
    """
    if device.type != "cuda":
        return lambda: None
    runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    status = runtime.cudaHostRegister(memory.data_ptr(), memory.numel() * memory.itemsize, 0)
    if int(status) != 0:
        raise _out_of_memory(f"pinning {memory.numel() * memory.itemsize} bytes of host memory")
    return lambda: runtime.cudaHostUnregister(memory.data_ptr())


def synchronize(device: torch.device) -> None:
    """Wait until `device` has done everything it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def release_cached_memory(device: torch.device) -> None:
    """Give back what torch keeps of freed device tensors for the next ones."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


@contextmanager
def host_waits_refused(device: torch.device) -> Iterator[None]:
    """Make it an error that something inside the block waits for a CUDA device, as far as torch
    knows; nothing on the CPU.

    Raises:
        RuntimeError: from where it waits.
    """
    if device.type != "cuda":
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def async_device(device: torch.device) -> CudaDevice | None:
    """How to run ahead of `device`; None where it computes when it is asked to."""
    return CudaDevice() if device.type == "cuda" else None


class CudaMark:
    """Implements `pending_step.Mark` by an event on the current stream."""

    def __init__(self) -> None:
        self._event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        self._event.record()

    @property
    def is_done(self) -> bool:
        """Asks, never waits."""
        return bool(self._event.query())  # type: ignore[no-untyped-call]

    def wait(self) -> None:
        """See `Mark.wait`."""
        self._event.synchronize()

    def seconds_since(self, earlier: Mark) -> float:
        """See `Mark.seconds_since`."""
        if not isinstance(earlier, CudaMark):
            raise InternalError("Marks of two kinds of devices have no time between them.")
        return float(earlier._event.elapsed_time(self._event)) / 1e3


class CudaDevice:
    """Implements `pending_step.AsyncDevice` for the current stream of the current CUDA device."""

    def mark(self) -> Mark:
        """See `AsyncDevice.mark`."""
        return CudaMark()

    def read_back(self, tensor: torch.Tensor) -> torch.Tensor:
        """See `AsyncDevice.read_back`; pinned, for else the copy would be waited for."""
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return host.copy_(tensor, non_blocking=True)


class GraphRecorder:
    """Records what functions launch on the current CUDA device, as graphs over one pool of memory.

    Graphs that share a pool take the memory of the largest, not of all; so they are replayed one
    at a time, and what one returned lives until the next is replayed.
    """

    def __init__(self) -> None:
        self._latest: torch.cuda.CUDAGraph | None = None

    def __call__(self, launch: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        """Record `launch`.

        Runs it twice before, on a stream of its own: libraries set themselves up at first use,
        which must not be recorded.

        Returns:
            A function that launches the graph and returns `launch`'s tensor, filled anew.

        Raises:
            DeviceOutOfMemoryError: the graph's memory does not fit.
        """
        with out_of_memory_as_error("capturing a decode step"):
            stream: torch.cuda.Stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(2):
                    launch()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._latest.pool() if self._latest else None):
                result = launch()
        self._latest = graph

        def replay() -> torch.Tensor:
            graph.replay()
            return result

        return replay


@contextmanager
def out_of_memory_as_error(what: str) -> Iterator[None]:
    """Turn torch's allocation failures inside the block into `DeviceOutOfMemoryError`.

    Args:
        what: what was being done, for the message ("allocating the KV cache").
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise _out_of_memory(what) from error
    except RuntimeError as error:
        if _CPU_OUT_OF_MEMORY not in str(error):
            raise
        raise _out_of_memory(what) from error


def _out_of_memory(what: str) -> DeviceOutOfMemoryError:
    return DeviceOutOfMemoryError(
        f"The device ran out of memory while {what}.",
        "Lower the model's KV memory or its max_step_tokens, or use more ranks.",
    )


def _host_available_bytes() -> int:
    if _MEMINFO.exists():
        for line in _MEMINFO.read_text().splitlines():
            name, _, value = line.partition(":")
            if name == "MemAvailable":
                return int(value.split()[0]) * 1024
    # Not Linux: all of the memory is the best that can be said without another dependency.
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
