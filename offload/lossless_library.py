"""The compiled codec of lossless records: see `offload/lossless/block.h` for what they look like.

Built and cached as the CPU kernels are (`replicas/kernels/build.py`). With AVX-512 one core decodes
as fast as it copies memory; without, in portable C++, much slower, which the probe measures before
anything is stored so.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

from cluster.base.errors import ConfigError, CorruptWeightsError, InternalError
from offload.layout import PAGE_BYTES
from replicas.kernels.build import BuildPlan, KernelsUnavailableError, build_library, find_compiler

SOURCES = Path(__file__).parent / "lossless"
_ABI = 2
_LINE_BYTES = 64
_IN_HEAD, _THE_REST = 0, 1
_P, _L, _I = ctypes.c_void_p, ctypes.c_long, ctypes.c_int


class LosslessLibrary:
    """Implements `RecordCodec`; its calls let go of the interpreter and need no lock.

    Args:
        march: instruction sets that the compiler may use.

    Raises:
        KernelsUnavailableError: it cannot be built or loaded.
    """

    name = "lossless 1"

    def __init__(self, cache_dir: Path, *, march: str = "native") -> None:
        plan = BuildPlan(compiler=find_compiler(), sources=SOURCES, march=march)
        path = build_library(plan, cache_dir)
        try:
            library = ctypes.CDLL(str(path))
            if library.pk_lossless_abi() != _ABI:
                raise KernelsUnavailableError(f"{path} has another interface")
            self._encode, self._decode = library.pk_lossless_encode, library.pk_lossless_decode
        except (OSError, AttributeError) as error:
            raise KernelsUnavailableError(f"{path} cannot be loaded ({error})") from error
        self._encode.argtypes, self._encode.restype = [_P, _L, _P, _I], _L
        self._decode.argtypes, self._decode.restype = [_P, _L, _L, _P, _L, _I], _L

    def encode(self, image: torch.Tensor) -> torch.Tensor | None:
        """See `RecordCodec`."""
        _check_pages(image)
        record = torch.empty_like(image)
        threads = torch.get_num_threads()
        size = self._encode(image.data_ptr(), image.numel(), record.data_ptr(), threads)
        return record[:size] if size else None

    def begin(self, memory: torch.Tensor, record_bytes: int, head: torch.Tensor) -> None:
        """See `RecordCodec`."""
        self._decoded(memory, record_bytes, head, _IN_HEAD)

    def decode(
        self, memory: torch.Tensor, record_bytes: int, head: torch.Tensor | None = None
    ) -> None:
        """See `RecordCodec`."""
        self._decoded(memory, record_bytes, head, _THE_REST)

    def _decoded(
        self, memory: torch.Tensor, record_bytes: int, head: torch.Tensor | None, part: int
    ) -> None:
        _check_pages(memory)
        if not 0 < record_bytes <= memory.numel() or memory.data_ptr() % _LINE_BYTES:
            raise InternalError(f"{record_bytes} bytes are no record in {memory.numel()}.")
        at, size = (0, 0) if head is None else (head.data_ptr(), head.numel())
        if at % _LINE_BYTES or size > record_bytes:
            raise InternalError(f"{size} bytes are no beginning of {record_bytes}.")
        damaged = self._decode(memory.data_ptr(), memory.numel(), record_bytes, at, size, part)
        if damaged:
            raise CorruptWeightsError(f"Block {damaged - 1} of a compressed record is damaged.")


def open_codec(cache_dir: Path) -> LosslessLibrary:
    """The codec, compiled where that has not been done yet.

    Raises:
        ConfigError: it cannot be.
    """
    try:
        return LosslessLibrary(cache_dir)
    except KernelsUnavailableError as error:
        raise ConfigError(
            f"Compressed weights cannot be decoded here: {error}.",
            "Install a C++ compiler, or set compression to none.",
            param="compression",
        ) from error


def _check_pages(memory: torch.Tensor) -> None:
    is_whole = memory.dtype is torch.uint8 and memory.is_contiguous() and memory.is_cpu
    if not is_whole or memory.numel() % PAGE_BYTES:
        raise InternalError(f"{tuple(memory.shape)} of {memory.dtype} are no whole pages of bytes.")
