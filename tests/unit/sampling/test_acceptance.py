"""Which sampled rows of a draft count."""

from replicas.sampling.acceptance import accepted, verdicts
from replicas.sampling.sampler import SampledRow


def rows(*token_ids: int | str) -> list[SampledRow]:
    return [
        SampledRow(error=token) if isinstance(token, str) else SampledRow(token_id=token)
        for token in token_ids
    ]


def kept(draft: tuple[int, ...], *token_ids: int | str) -> list[int | str]:
    return [row.error or row.token_id for row in accepted(draft, rows(*token_ids))]


def test_rows_count_up_to_the_first_that_differs() -> None:
    assert kept((), 4) == [4]
    assert kept((4, 5), 4, 5, 6) == [4, 5, 6]
    assert kept((4, 5), 4, 7, 6) == [4, 7]
    assert kept((4, 5), 9, 5, 6) == [9]


def test_a_failure_counts_only_where_no_token_stands_before_it() -> None:
    assert kept((), "nan") == ["nan"]
    assert kept((4, 5), "nan", 5, 6) == ["nan"]
    assert kept((4, 5), 4, "nan", 6) == [4]
    assert kept((4, 5), 4, 5, "nan") == [4, 5]
    assert kept((4, 5), 7, "nan", 6) == [7]


def test_each_request_takes_its_rows() -> None:
    found = verdicts([(4,), (), (4, 5)], rows(4, 6, 7, 4, 9, 1))
    assert [[row.token_id for row in verdict] for verdict in found] == [[4, 6], [7], [4, 9]]
    assert [[row.token_id for row in verdict] for verdict in verdicts((), rows(4, 6))] == [[4], [6]]
