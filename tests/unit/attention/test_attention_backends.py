"""CPU backends against oracle, oracle against the definition, on random ragged batches."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from replicas.attention.cpu import CpuAttention
from replicas.attention.cpu_paged import CpuPagedAttention
from replicas.attention.torch_ref import TorchReferenceAttention
from replicas.kernels.cpu_ops import CpuKernels
from tests.support.attention_cases import AttentionCase as Case

DTYPES = {"float32": (torch.float32, 2e-5), "bfloat16": (torch.bfloat16, 2e-2)}

requests = st.lists(
    st.tuples(st.one_of(st.just(1), st.integers(1, 13)), st.integers(0, 20)), min_size=1, max_size=5
).map(tuple)
cases = st.builds(
    Case,
    requests=requests,
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 4),
    head_dim=st.sampled_from([2, 8, 24, 64, 80]),
    block_size=st.sampled_from([1, 3, 4, 16]),
    window=st.one_of(st.none(), st.integers(1, 24)),
    dtype=st.sampled_from(list(DTYPES)),
    seed=st.integers(0, 2**20),
)


@settings(max_examples=80)
@given(cases.filter(lambda case: case.fits))
def test_cpu_equals_the_oracle(case: Case) -> None:
    tolerance = DTYPES[case.dtype][1]
    expected, expected_cache = case.run(TorchReferenceAttention(case.spec))
    output, cache = case.run(CpuAttention(case.spec))
    assert output.dtype == DTYPES[case.dtype][0]
    assert torch.equal(cache, expected_cache)
    torch.testing.assert_close(output, expected, atol=tolerance, rtol=tolerance)


@settings(max_examples=150)
@given(case=cases.filter(lambda case: case.fits), threads=st.sampled_from([1, 2]))
def test_paged_equals_the_oracle(cpu_kernels: CpuKernels, case: Case, threads: int) -> None:
    tolerance = DTYPES[case.dtype][1]
    expected, expected_cache = case.run(TorchReferenceAttention(case.spec))
    torch.set_num_threads(threads)
    try:
        output, cache = case.run(CpuPagedAttention(case.spec, cpu_kernels.library))
    finally:
        torch.set_num_threads(1)
    assert output.dtype == DTYPES[case.dtype][0]
    assert torch.equal(cache, expected_cache)
    torch.testing.assert_close(output, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("window", [None, 9, 70])
def test_paged_rows_depend_on_their_own_request_alone(
    cpu_kernels: CpuKernels, dtype: str, window: int | None
) -> None:
    """Neither neighbours nor chunks nor threads change a bit."""
    case = Case(
        requests=((1, 97), (70, 60), (1, 3), (11, 0), (1, 64)),
        head_dim=64,
        block_size=16,
        window=window,
        dtype=dtype,
    )
    backend = CpuPagedAttention(case.spec, cpu_kernels.library)
    together, cache = case.run(backend)
    torch.set_num_threads(2)
    assert torch.equal(case.run(backend)[0], together)
    torch.set_num_threads(1)
    for row in range(len(together)):
        alone = case.run_alone(backend, range(row, row + 1), cache)
        assert torch.equal(alone, together[row : row + 1]), row


@pytest.mark.parametrize("window", [None, 90])
def test_a_prompt_has_the_bits_of_its_decoded_tokens(
    cpu_kernels: CpuKernels, window: int | None
) -> None:
    """A prompt's tokens go head by head through the context, a decoded one's heads together."""
    case = Case(
        requests=((200, 20),),
        kv_heads=3,
        group=4,
        head_dim=128,
        block_size=16,
        window=window,
        dtype="bfloat16",
    )
    backend = CpuPagedAttention(case.spec, cpu_kernels.library)
    together, cache = case.run(backend)
    for row in range(len(together)):
        alone = case.run_alone(backend, range(row, row + 1), cache)
        assert torch.equal(alone, together[row : row + 1]), row


@pytest.mark.parametrize("window", [None, 40])
def test_decoding_with_more_heads_than_a_task_takes_equals_the_oracle(
    cpu_kernels: CpuKernels, window: int | None
) -> None:
    case = Case(
        requests=tuple((1, context) for context in (0, 15, 16, 63, 64, 65, 130, 3, 200)),
        kv_heads=21,
        group=1,
        head_dim=128,
        block_size=16,
        window=window,
        dtype="bfloat16",
    )
    expected, _ = case.run(TorchReferenceAttention(case.spec))
    output, _ = case.run(CpuPagedAttention(case.spec, cpu_kernels.library))
    torch.testing.assert_close(output, expected, atol=2e-2, rtol=2e-2)


@settings(max_examples=60)
@given(
    case=st.builds(
        Case,
        requests=st.lists(
            st.tuples(st.one_of(st.just(1), st.integers(1, 80)), st.integers(0, 90)),
            min_size=1,
            max_size=3,
        ).map(tuple),
        kv_heads=st.integers(1, 2),
        group=st.sampled_from([1, 3, 8, 17, 33]),
        head_dim=st.sampled_from([32, 64, 128]),
        block_size=st.sampled_from([16, 32]),
        window=st.one_of(st.none(), st.integers(1, 100)),
        dtype=st.just("bfloat16"),
        seed=st.integers(0, 2**20),
    ).filter(lambda case: case.fits),
    threads=st.sampled_from([1, 2]),
)
def test_paged_on_whole_tiles_equals_the_oracle(
    cpu_kernels: CpuKernels, case: Case, threads: int
) -> None:
    """Shapes that processors with matrix tiles take another way for."""
    expected, expected_cache = case.run(TorchReferenceAttention(case.spec))
    torch.set_num_threads(threads)
    try:
        output, cache = case.run(CpuPagedAttention(case.spec, cpu_kernels.library))
    finally:
        torch.set_num_threads(1)
    assert torch.equal(cache, expected_cache)
    torch.testing.assert_close(output, expected, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", ["query", "key", "value"])
@pytest.mark.parametrize("shape", [("float32", 16, 4), ("bfloat16", 32, 16)])
def test_paged_spreads_the_not_finite_as_the_oracle(
    cpu_kernels: CpuKernels, poison: float, where: str, shape: tuple[str, int, int]
) -> None:
    dtype, head_dim, block_size = shape
    case = Case(requests=((1, 18), (1, 5)), head_dim=head_dim, block_size=block_size, dtype=dtype)
    tensors = dict(zip(("query", "key", "value", "cache"), case.tensors(), strict=True))
    tensors[where][0, 0, 3] = poison
    outputs = [
        backend.forward(
            tensors["query"],
            tensors["key"],
            tensors["value"],
            tensors["cache"].clone(),
            case.metadata(),
            None,
        )
        for backend in (
            TorchReferenceAttention(case.spec),
            CpuPagedAttention(case.spec, cpu_kernels.library),
        )
    ]
    assert not outputs[0].isfinite().all() or where != "value"
    near = DTYPES[dtype][1]
    torch.testing.assert_close(outputs[1], outputs[0], equal_nan=True, atol=near, rtol=near)


def test_what_others_left_in_a_block_is_never_used(cpu_kernels: CpuKernels) -> None:
    """Slots behind a request's last token may hold the NaN of a request that failed."""
    case = Case(requests=((1, 18), (3, 4)), head_dim=32, block_size=16, dtype="bfloat16")
    query, key, value, cache = case.tensors()
    metadata = case.metadata()
    used = torch.zeros(cache.shape[1:3], dtype=torch.bool)
    for table, length in zip(metadata.block_tables_RN.tolist(), metadata.seq_lens, strict=True):
        for position in range(length):
            used[table[position // 16], position % 16] = True
    cache[:, ~used] = torch.nan
    backend = CpuPagedAttention(case.spec, cpu_kernels.library)
    assert backend.forward(query, key, value, cache, metadata, None).isfinite().all()


@pytest.mark.parametrize("window", [None, 1, 3, 50])
def test_oracle_is_the_definition(window: int | None) -> None:
    """Written out with Python numbers for one request of one head."""
    case = Case(requests=((5, 4),), kv_heads=1, group=1, window=window, seed=3)
    output, cache = case.run(TorchReferenceAttention(case.spec))
    table = case.metadata().block_tables_RN[0].tolist()
    rows = [(table[p // 4], p % 4) for p in range(9)]
    keys = [cache[0, block, offset, 0].double() for block, offset in rows]
    values = [cache[1, block, offset, 0].double() for block, offset in rows]
    query = case.tensors()[0]
    for index, position in enumerate(range(4, 9)):
        seen = [p for p in range(position + 1) if window is None or p > position - window]
        weights = torch.stack([torch.exp(0.3 * query[index, 0].double() @ keys[p]) for p in seen])
        mixed = sum(w * values[p] for w, p in zip(weights / weights.sum(), seen, strict=True))
        torch.testing.assert_close(output[index, 0].double(), mixed, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", [CpuAttention, TorchReferenceAttention])
@pytest.mark.parametrize("window", [None, 5])
def test_neighbours_change_no_bit(
    backend: type[CpuAttention] | type[TorchReferenceAttention], window: int | None
) -> None:
    case = Case(requests=((1, 17), (6, 9), (1, 3), (11, 0)), window=window)
    together, cache = case.run(backend(case.spec))
    starts = case.metadata().query_start
    for begin, end in itertools.pairwise(starts):
        alone = case.run_alone(backend(case.spec), range(begin, end), cache.clone())
        assert torch.equal(alone, together[begin:end])


def test_only_own_slots_are_written() -> None:
    case = Case(requests=((3, 2), (1, 6)))
    before = case.tensors()[3]
    _, after = case.run(CpuAttention(case.spec))
    changed = (before != after).flatten(3).any(-1).any(0).flatten().nonzero().flatten()
    assert changed.tolist() == sorted(case.metadata().slot_mapping_T.tolist())
