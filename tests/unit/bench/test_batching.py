"""The lengths that the batching benchmark takes from a trace."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.batching import SAMPLE, Lengths, read_lengths, requests_of


def test_lengths_are_spread_over_the_trace_and_scaled(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    lines = [f"2023-11-16 18:15:46,{100 * index},{index}" for index in range(1, 11)]
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + "\n".join(lines))
    assert read_lengths(trace, 5, 10) == [
        Lengths(prompt=10 * index, output=max(1, round(index / 10))) for index in (1, 3, 5, 7, 9)
    ]
    with pytest.raises(ValueError, match="10 requests, not 11"):
        read_lengths(trace, 11, 1)


def test_the_committed_sample_has_requests_enough() -> None:
    lengths = read_lengths(SAMPLE, 160, 16)
    requests = requests_of(lengths, 100)
    assert [len(request.prompt_token_ids) for request in requests] == [
        each.prompt for each in lengths
    ]
    assert [request.params.max_tokens for request in requests] == [each.output for each in lengths]
