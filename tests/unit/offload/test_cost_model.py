"""The cost model against published figures, its own closed forms, and hand arithmetic."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from offload_shapes import GB, machine, uniform_model

from offload.compression import Compression
from offload.cost_model import (
    PassCost,
    PassLoad,
    Resource,
    balance_tokens,
    pass_time,
    time_to_first_token_s,
)
from offload.homes import KvHome, Placement, distinct_experts
from offload.layout import aligned
from offload.model_shape import ModelShape, layer_values, model_shape
from offload.precision import Precision
from offload.rates import GemmPoint
from replicas.models.hf_config import arch_from_hf

STREAM_ALL = Placement(resident_layers=0, host_layers=40)


def test_micro_batches_move_the_weights_once_and_compute_each_part() -> None:
    """Reading a layer's weights from the device's memory for each part is what they cost."""
    model, rates = uniform_model(), machine()
    load = PassLoad(rows=1, context_tokens=0, prompt_tokens=1023)
    whole = pass_time(model, STREAM_ALL, rates, load)
    cut = pass_time(model, replace(STREAM_ALL, micro_batch_tokens=256), rates, load)
    assert dict(cut.seconds)[Resource.LINK] == dict(whole.seconds)[Resource.LINK]
    assert dict(cut.seconds)[Resource.COMPUTE] == pytest.approx(
        dict(whole.seconds)[Resource.COMPUTE]
    )
    points = (GemmPoint(tokens=8, flops_per_s=1e12), GemmPoint(tokens=512, flops_per_s=1e14))
    flat = replace(rates, gemm=points)
    slow = pass_time(model, replace(STREAM_ALL, micro_batch_tokens=8), flat, load)
    fast = pass_time(model, replace(STREAM_ALL, micro_batch_tokens=512), flat, load)
    assert dict(slow.seconds)[Resource.COMPUTE] > 10 * dict(fast.seconds)[Resource.COMPUTE]


def test_what_micro_batches_and_windows_take_by_hand() -> None:
    """40 layers; 8 micro-batches of 32 tokens. A whole step pays one layer's calls, cold."""
    model = uniform_model(kv_bytes_per_token=10**6)
    rates = replace(
        machine(),
        device_is_host=True,
        layer_overhead_s=3e-4,
        part_overhead_s=1e-4,
        kv_window_s=2e-4,
        kv_copy_bytes_per_s=5 * GB,
    )
    load = PassLoad(rows=1, context_tokens=0, prompt_tokens=255, prompt_context_tokens=1000)
    streamed = {"kv_home": KvHome.STREAMED, "kv_windows": 2, "kv_window_tokens": 10_000}

    def compute_s(**changes: Any) -> float:
        placement = replace(STREAM_ALL, **changes)
        return dict(pass_time(model, placement, rates, load).seconds)[Resource.COMPUTE]

    whole, cut = compute_s(), compute_s(micro_batch_tokens=32)
    assert cut - whole == pytest.approx(40 * 7 * 1e-4)
    # Loaded what is attended to; stored a block of the decoding row, and the prompt.
    copied = (1000 + 16 + 255) * 10**6 / (5 * GB)
    assert compute_s(**streamed) - whole == pytest.approx(copied + 40 * 2e-4)
    windows = compute_s(micro_batch_tokens=32, **streamed) - cut
    assert windows == pytest.approx(copied + 40 * 8 * 2e-4)
    unmeasured = replace(rates, part_overhead_s=0.0)
    placement = replace(STREAM_ALL, micro_batch_tokens=32)
    slower = dict(pass_time(model, placement, unmeasured, load).seconds)[Resource.COMPUTE]
    assert slower - whole == pytest.approx(40 * 7 * 3e-4)


@pytest.mark.parametrize(
    ("resident_layers", "rows", "published"), [(24, 64, 18), (20, 128, 32), (0, 256, 43)]
)
def test_the_zero_inference_table_of_2022(resident_layers: int, rows: int, published: int) -> None:
    """OPT-30B in fp16 on a V100, weights in host memory: 12, 10 and 0 of 30 billion parameters
    resident. One bandwidth, taken from the last row, gives the other two within 1 %."""
    model = uniform_model(60, 500_000_000)
    rates = machine(link=43 * 60 * GB / 256, flops=60e12, memory=800 * GB)
    placement = Placement(resident_layers=resident_layers, host_layers=60 - resident_layers)
    time = pass_time(model, placement, rates, PassLoad(rows=rows, context_tokens=0))
    assert time.bound is Resource.LINK
    assert rows / time.total_s == pytest.approx(published, rel=0.01)


def test_every_resource_can_be_the_one_that_binds() -> None:
    model, load = uniform_model(), PassLoad(rows=64, context_tokens=2000)
    cases = {
        Resource.DISK: (replace(STREAM_ALL, host_layers=0), machine()),
        Resource.LINK: (STREAM_ALL, machine()),
        Resource.COMPUTE: (STREAM_ALL, machine(flops=1e9)),
        Resource.KV_LINK: (replace(STREAM_ALL, kv_home=KvHome.STREAMED), machine()),
        Resource.HOST_ATTENTION: (
            replace(STREAM_ALL, kv_home=KvHome.HOST),
            replace(machine(), host_memory_bytes_per_s=1 * GB),
        ),
    }
    for bound, (placement, rates) in cases.items():
        assert pass_time(model, placement, rates, load).bound is bound


def test_parts_of_a_pass_by_hand() -> None:
    model = uniform_model(10, 1_000_000_000, kv_bytes_per_token=10**6)
    placement = Placement(resident_layers=2, host_layers=3, precision=Precision.INT8)
    rates = machine(disk=2 * GB, link=8 * GB, flops=1e12, memory=100 * GB, dequant=50e9)
    load = PassLoad(rows=10, context_tokens=100, prompt_tokens=30)
    seconds = dict(pass_time(model, placement, rates, load).seconds)
    layer_bytes = 1.0625 * GB
    assert seconds[Resource.DISK] == pytest.approx(5 * layer_bytes / (2 * GB))
    assert seconds[Resource.LINK] == pytest.approx(8 * layer_bytes / (8 * GB))
    multiply, dequantise, attend = 2 * 10e9 * 40 / 1e12, 10e9 / 50e9, 10 * 100 * 10**6 / (100 * GB)
    assert seconds[Resource.COMPUTE] == pytest.approx(multiply + dequantise + attend)


def test_what_rows_take_beside_products_grows_with_them() -> None:
    """40 layers of 50 thousand values at 1 ns, 8000 logits; keys and values at 10 GB/s."""
    model = replace(uniform_model(), row_values=40 * 50_000, logits=8000)
    rates = replace(machine(), row_value_s=1e-9, attention_bytes_per_s=10 * GB)
    plain = replace(uniform_model(), kv_bytes_per_token=0)

    def compute_s(shape: ModelShape, load: PassLoad) -> float:
        return dict(pass_time(shape, STREAM_ALL, rates, load).seconds)[Resource.COMPUTE]

    for rows in (1, 8, 64):
        load = PassLoad(rows=rows, context_tokens=500, prompt_tokens=100)
        beside = compute_s(model, load) - compute_s(plain, load)
        values = (rows + 100) * 40 * 50_000 + rows * 8000
        assert beside == pytest.approx(values * 1e-9 + rows * 500 * 100_000 / (10 * GB))


def test_one_slot_is_serial_two_nearly_hide_three_do() -> None:
    model, load = uniform_model(), PassLoad(rows=1, context_tokens=0)
    rates = machine(link=10 * GB, flops=1e10)
    times = {
        slots: pass_time(model, replace(STREAM_ALL, ring_slots=slots), rates, load).total_s
        for slots in (1, 2, 3, 4)
    }
    transfer, compute = 4.0, 4.0
    assert times[1] == pytest.approx(transfer + compute)
    assert transfer < times[2] < 1.1 * transfer
    assert times[3] == times[4] == pytest.approx(transfer)


@pytest.mark.parametrize(("precision", "expected"), [("native", 12727), ("int8", 6761)])
def test_balance_batch_is_bytes_times_flops_over_twice_the_link(
    precision: str, expected: int
) -> None:
    """H200-like: 700 TFLOP/s, 55 GB/s: b F / (2 BW)."""
    placement = replace(STREAM_ALL, precision=Precision(precision))
    tokens = balance_tokens(uniform_model(), placement, machine(link=55 * GB, flops=700e12))
    assert tokens == pytest.approx(expected, rel=0.001)


@given(
    tokens=st.integers(1, 5000),
    rates=st.lists(st.floats(1e9, 1e13), min_size=3, max_size=3),
)
def test_more_rows_never_take_less_time_when_measured_points_say_so(
    tokens: int, rates: list[float]
) -> None:
    points = tuple(
        GemmPoint(tokens=at, flops_per_s=rate) for at, rate in zip((1, 16, 256), rates, strict=True)
    )
    seconds = [point.seconds_per_weight for point in points]
    at = replace(machine(), gemm=points)
    if seconds == sorted(seconds):
        assert at.gemm_s(1e9, tokens) <= at.gemm_s(1e9, tokens + 1) * (1 + 1e-9)
    for point in points:
        assert at.gemm_s(1e9, point.tokens) == pytest.approx(1e9 * point.seconds_per_weight)


def test_first_token_takes_one_pass_per_chunk_and_longer_ones_past_the_balance() -> None:
    model, rates = uniform_model(), machine(link=10 * GB, flops=100e12)
    one = pass_time(model, STREAM_ALL, rates, PassLoad(rows=1, context_tokens=0)).total_s
    hidden = time_to_first_token_s(model, STREAM_ALL, rates, prompt_tokens=2048, chunk=512)
    assert hidden == pytest.approx(4 * one)
    wide = time_to_first_token_s(model, STREAM_ALL, rates, prompt_tokens=40_000, chunk=40_000)
    assert wide == pytest.approx(2 * 20e9 * 40_000 / 100e12)


def test_shape_of_a_real_architecture_adds_up() -> None:
    arch = arch_from_hf(
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "num_hidden_layers": 3,
            "vocab_size": 256,
            "max_position_embeddings": 512,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": True,
        }
    )
    shape = model_shape(arch, 1, "bfloat16")
    assert [layer.base.name for layer in shape.layers] == ["layer.0", "layer.1", "layer.2"]
    linear = 64 * (64 + 32 + 32) + 64 * 64 + 3 * 64 * 128
    assert shape.layers[0].linear_weights == linear
    # Pages of 4 KiB hold the norms too; these shapes need no padding.
    assert shape.layers[0].record_bytes(Precision.NATIVE) == aligned(2 * (linear + 2 * 64))
    assert shape.layers[0].record_bytes(Precision.INT4) == aligned(linear * 9 // 16 + 4 * 64)
    # Tied: held once, read by the embedding and again by the head; the norm has a page.
    assert shape.fixed_bytes == 2 * 256 * 64 + 4096
    assert shape.fixed_read_bytes == 2 * (2 * 256 * 64) + 4096
    assert shape.head_weights == 256 * 64
    assert shape.row_values == 3 * layer_values(64, 128, query_width=64, kv_width=32)
    assert shape.logits == 256


def test_experts_hit_by_uniform_routing() -> None:
    """E = 128, k = 8: 8, 52, 112, 126 experts for 1, 8, 32, 64 tokens."""
    hit = [round(distinct_experts(128, 8, tokens)) for tokens in (1, 8, 32, 64)]
    assert hit == [8, 52, 112, 126]


def compressed_pass(*, decode: float, slowdown: float = 0.0, **changes: Any) -> PassCost:
    """One row over 40 GB of layers, none resident, two thirds of them on disk."""
    rates = replace(machine(), decode_bytes_per_s=decode, decode_slowdown=slowdown)
    rates = replace(rates, device_is_host=True)
    model = replace(uniform_model(), stored_share=2 / 3)
    fields = {
        "resident_layers": 0,
        "host_layers": 0,
        "compression": Compression.LOSSLESS,
        "ring_slots": 4,
    }
    placement = Placement(**(fields | changes))
    return pass_time(model, placement, rates, PassLoad(rows=1, context_tokens=0))


def test_compressed_records_cost_the_disk_what_is_stored_and_a_core_what_they_decode_to() -> None:
    plain = compressed_pass(decode=8 * GB, compression=Compression.NONE)
    fast = compressed_pass(decode=8 * GB)
    assert fast.bound is Resource.DISK
    assert fast.total_s == pytest.approx(plain.total_s * 2 / 3)
    slow = compressed_pass(decode=2 * GB)
    assert slow.bound is Resource.DECODE
    assert slow.total_s == pytest.approx(plain.total_s * 3 / 2)
    assert compressed_pass(decode=0.0).total_s > 1e9


def test_decoding_takes_from_the_cores_that_compute_where_none_is_free() -> None:
    alone, shared = (dict(compressed_pass(decode=8 * GB, slowdown=s).seconds) for s in (0.0, 0.5))
    taken_s = shared[Resource.COMPUTE] - alone[Resource.COMPUTE]
    assert taken_s == pytest.approx(0.5 * alone[Resource.DECODE])
    assert (
        compressed_pass(decode=8 * GB).total_s
        < compressed_pass(decode=8 * GB, ring_slots=3).total_s
    )
    in_turn = dict(compressed_pass(decode=8 * GB, ring_slots=2).seconds)
    assert in_turn[Resource.COMPUTE] == pytest.approx(
        alone[Resource.COMPUTE] + alone[Resource.DECODE]
    )


def test_reads_slow_a_host_that_computes_for_as_long_as_they_last() -> None:
    """A quarter of the computation is lost while the disk is read: compute-bound passes take that
    much longer, and those bound by the disk take no longer than it."""
    model = uniform_model(8, 500_000_000)
    placement = Placement(resident_layers=0, host_layers=0)
    load = PassLoad(rows=1, context_tokens=0)
    for flops in (1e9, 1e13):
        free = machine(flops=flops)
        lossy = replace(free, compute_lost_to_reads=0.25, device_is_host=True)
        alone = pass_time(model, placement, free, load)
        beside = pass_time(model, placement, lossy, load)
        read_s = dict(alone.seconds)[Resource.DISK]
        compute_s = dict(alone.seconds)[Resource.COMPUTE]
        assert beside.total_s == pytest.approx(max(read_s, compute_s + 0.25 * read_s))
        assert (beside.total_s > alone.total_s) == (flops == 1e9)
