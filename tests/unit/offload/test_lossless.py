"""Lossless records: every bit comes back, in place, and damage is never taken for weights."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.base.env import default_cache_dir
from cluster.base.errors import ConfigError, CorruptWeightsError, InternalError
from offload.layout import PAGE_BYTES
from offload.lossless_library import LosslessLibrary, open_codec
from replicas.kernels.build import KernelsUnavailableError
from tests.support import lossless_oracle

PAGE_WEIGHTS = PAGE_BYTES // 2
PORTABLE = "x86-64-v2" if platform.machine() == "x86_64" else "native"


@pytest.fixture(scope="module", params=["native", PORTABLE])
def codec(request: pytest.FixtureRequest) -> LosslessLibrary:
    try:
        return LosslessLibrary(default_cache_dir() / "kernels", march=request.param)
    except KernelsUnavailableError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def native() -> LosslessLibrary:
    try:
        return LosslessLibrary(default_cache_dir() / "kernels")
    except KernelsUnavailableError as error:
        pytest.skip(str(error))


def pages(num_pages: int) -> torch.Tensor:
    """Page-aligned memory."""
    block = torch.zeros((num_pages + 1) * PAGE_BYTES, dtype=torch.uint8)
    skipped = -block.data_ptr() % PAGE_BYTES
    return block[skipped : skipped + num_pages * PAGE_BYTES]


def image_of(weights: torch.Tensor) -> torch.Tensor:
    """The bytes of weights, with zeros up to whole pages."""
    data = weights.contiguous().view(-1).view(torch.uint8)
    image = pages(-(-data.numel() // PAGE_BYTES))
    image[: data.numel()] = data
    return image


def normal(num_pages: int, scale: float = 0.02) -> torch.Tensor:
    torch.manual_seed(num_pages)
    return image_of((torch.randn(num_pages * PAGE_WEIGHTS) * scale).bfloat16())


def laid_in(record: torch.Tensor, image_bytes: int) -> torch.Tensor:
    """Memory of an image that holds something else, and a record at its end."""
    memory = pages(image_bytes // PAGE_BYTES).fill_(0xA5)
    memory[image_bytes - record.numel() :] = record
    return memory


def check_round_trip(codec: LosslessLibrary, image: torch.Tensor) -> int:
    """Whatever it takes; returns the record's bytes, or those of the image."""
    record = codec.encode(image)
    if record is None:
        return image.numel()
    assert record.numel() < image.numel()
    memory = laid_in(record, image.numel())
    codec.decode(memory, record.numel())
    assert torch.equal(memory, image)
    assert lossless_oracle.decode(record.numpy().tobytes(), image.numel()) == (
        image.numpy().tobytes()
    )
    return record.numel()


def test_every_bit_pattern_comes_back(codec: LosslessLibrary) -> None:
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    shuffled = every[torch.randperm(2**16, generator=torch.Generator().manual_seed(1))]
    usual = (torch.randn(2**18) * 0.02).bfloat16().view(torch.int16)
    for patterns in (every, shuffled):  # blocks of their own, and spread over usual weights
        check_round_trip(codec, image_of(torch.cat((usual, patterns))))
        mixed = usual.clone()
        mixed[torch.arange(2**16) * 4 + 1] = patterns
        check_round_trip(codec, image_of(mixed))


@pytest.mark.parametrize(
    "value", [0.0, -0.0, 1.0, torch.inf, -torch.inf, torch.nan, 1e-40, -1e-40, 3e38]
)
def test_weights_that_are_all_the_same(codec: LosslessLibrary, value: float) -> None:
    image = image_of(torch.full((40000,), value).bfloat16())
    assert check_round_trip(codec, image) < 0.75 * image.numel()


@pytest.mark.parametrize("num_pages", [1, 2, 3, 7, 8, 9, 16, 17, 100])
def test_images_of_any_number_of_pages(codec: LosslessLibrary, num_pages: int) -> None:
    check_round_trip(codec, normal(num_pages))


def test_normal_weights_take_two_thirds(codec: LosslessLibrary) -> None:
    for scale in (1e-3, 0.02, 1.0, 300.0):
        image = normal(512, scale)
        assert check_round_trip(codec, image) < 0.675 * image.numel()


def test_both_builds_write_the_same_bytes(codec: LosslessLibrary, native: LosslessLibrary) -> None:
    image = normal(33)
    assert torch.equal(codec.encode(image), native.encode(image))


def test_noise_is_left_alone(codec: LosslessLibrary) -> None:
    noise = torch.randint(0, 256, (64 * PAGE_BYTES,), dtype=torch.uint8)
    assert codec.encode(image_of(noise)) is None


def test_blocks_of_noise_among_weights_are_stored_as_they_are(codec: LosslessLibrary) -> None:
    image = normal(8 * 6)
    for first in (0, 24, 40):  # the last one too: nothing is left to be made room with
        image[first * PAGE_BYTES : (first + 8) * PAGE_BYTES].random_()
    assert check_round_trip(codec, image) < image.numel()


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_distributions_of_all_kinds(native: LosslessLibrary, data: st.DataObject) -> None:
    seed = data.draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for _ in range(data.draw(st.integers(1, 5))):
        count = data.draw(st.integers(1, 40000))
        kind = data.draw(st.sampled_from(["normal", "uniform", "bits", "sparse", "narrow"]))
        part = torch.randn(count, generator=generator)
        part *= 2.0 ** data.draw(st.integers(-130, 120))
        if kind == "uniform":
            part = torch.rand(count, generator=generator)
        elif kind == "sparse":
            part[torch.rand(count, generator=generator) < 0.9] = 0
        weights = part.bfloat16().view(torch.int16)
        if kind == "bits":
            weights = torch.randint(-(2**15), 2**15, (count,), generator=generator).to(torch.int16)
        elif kind == "narrow":
            weights = torch.randint(0, 2**11, (count,), generator=generator).to(torch.int16)
        parts.append(weights)
    check_round_trip(native, image_of(torch.cat(parts)))


def test_each_damaged_bit_is_found(codec: LosslessLibrary) -> None:
    image = normal(17)
    record = codec.encode(image)
    assert record is not None
    used = len(record) - PAGE_BYTES
    generator = torch.Generator().manual_seed(0)
    places = torch.randint(0, record.numel() * 8, (2000,), generator=generator).tolist()
    num_found = 0
    for place in places:
        memory = laid_in(record, image.numel())
        memory[image.numel() - record.numel() + place // 8] ^= 1 << place % 8
        try:
            codec.decode(memory, record.numel())
        except CorruptWeightsError:
            num_found += 1
        else:  # zeros that fill a page
            assert torch.equal(memory, image)
    assert num_found > len(places) * used / len(record)


@pytest.mark.parametrize("num_pages", [9, 17, 40])
def test_a_beginning_that_lies_elsewhere(codec: LosslessLibrary, num_pages: int) -> None:
    """Every cut at a page; `begin` writes nothing where the rest may still be arriving."""
    image = normal(num_pages)
    record = codec.encode(image)
    assert record is not None
    for cut in range(0, record.numel() + 1, PAGE_BYTES):
        head = pages(cut // PAGE_BYTES)
        head[:] = record[:cut]
        memory = pages(num_pages).fill_(0xA5)
        rest = memory[image.numel() - record.numel() + cut :]
        codec.begin(memory, record.numel(), head)
        assert (rest == 0xA5).all()
        rest[:] = record[cut:]
        codec.decode(memory, record.numel(), head)
        assert torch.equal(memory, image)


def test_a_damaged_beginning_is_found(native: LosslessLibrary) -> None:
    image = normal(40)
    record = native.encode(image)
    assert record is not None
    head = pages(20)
    head[:] = record[: head.numel()]
    memory = laid_in(record, image.numel())
    for place in range(0, head.numel(), 997):
        head[place] ^= 4
        try:
            native.begin(memory, record.numel(), head)
            native.decode(memory, record.numel(), head)
        except CorruptWeightsError:
            memory = laid_in(record, image.numel())
        else:  # zeros between entries and payloads
            assert torch.equal(memory, image)
            memory = laid_in(record, image.numel())
        head[place] ^= 4


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_rubbish_is_refused_and_stays_in_its_memory(
    native: LosslessLibrary, data: st.DataObject
) -> None:
    image = normal(9)
    record = native.encode(image)
    assert record is not None
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    first = data.draw(st.integers(0, record.numel() - 1))
    last = data.draw(st.integers(first + 1, record.numel()))
    record[first:last] = torch.randint(
        0, 256, (last - first,), dtype=torch.uint8, generator=generator
    )
    around = pages(9 + 2).fill_(0x5A)
    memory = around[PAGE_BYTES : 10 * PAGE_BYTES]
    memory[memory.numel() - record.numel() :] = record
    try:
        native.decode(memory, record.numel())
    except CorruptWeightsError:
        pass
    else:
        assert torch.equal(memory, image)
    assert (around[:PAGE_BYTES] == 0x5A).all()
    assert (around[10 * PAGE_BYTES :] == 0x5A).all()


def test_memory_that_is_not_whole_pages_is_an_error(native: LosslessLibrary) -> None:
    with pytest.raises(InternalError):
        native.encode(pages(2)[:-64])
    with pytest.raises(InternalError):
        native.decode(pages(2), 64)


def test_without_a_compiler_the_refusal_names_the_setting(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("replicas.kernels.build.COMPILERS", ())
    with pytest.raises(ConfigError, match="no C\\+\\+ compiler") as refused:
        open_codec(tmp_path)
    assert refused.value.param == "compression"
