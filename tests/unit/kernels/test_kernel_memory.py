"""Tensors from shared mappings do not overlap, and live as long as they are used."""

from __future__ import annotations

import gc

import pytest
import torch

from replicas.kernels import memory
from replicas.kernels.memory import HugePages, ScratchMemory


def test_pieces_are_zero_apart_and_aligned() -> None:
    pages = HugePages()
    shapes = [(3, 5), (1, 70_000), (0, 4), (2000, 2000), (7,)]
    pieces = [pages.zeros(shape, torch.float32) for shape in shapes for _ in range(3)]
    for piece in pieces:
        assert not piece.any()
        assert piece.data_ptr() % 64 == 0
    for index, piece in enumerate(pieces):
        piece.fill_(index)
    for index, piece in enumerate(pieces):
        assert (piece == index).all()
    del pages
    gc.collect()
    assert all((piece == index).all() for index, piece in enumerate(pieces))


def test_large_pieces_begin_on_a_large_page() -> None:
    big = HugePages().zeros((memory._CHUNK_BYTES + 1,), torch.uint8)
    assert big.data_ptr() % memory._HUGE_BYTES == 0
    big[-1] = 1


def test_too_much_is_said_as_torch_says_it() -> None:
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        HugePages().zeros((1 << 58,), torch.uint8)


def test_scratch_grows_and_is_kept() -> None:
    scratch = ScratchMemory()
    first = scratch.at_least(10)
    assert scratch.at_least(1000) == first
    assert scratch.at_least(memory._HUGE_BYTES + 1) % 64 == 0
    assert scratch.at_least(10) == scratch.at_least(memory._HUGE_BYTES + 1)
