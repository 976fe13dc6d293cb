"""Axes over ranks: neighbours, groups, round trips."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.base.errors import ConfigError
from cluster.dist.mesh import Mesh

meshes = st.lists(st.integers(1, 4), min_size=1, max_size=3).map(
    lambda sizes: Mesh(tuple(zip(("dp", "ep", "tp"), sizes, strict=False)))
)


def test_last_axis_varies_fastest() -> None:
    mesh = Mesh((("dp", 2), ("tp", 4)))
    assert mesh.num_ranks == 8
    assert mesh.coordinates(6) == {"dp": 1, "tp": 2}
    assert mesh.group("tp", 6) == (4, 5, 6, 7)
    assert mesh.group("dp", 6) == (2, 6)
    assert mesh.group("ep", 6) == (6,)
    assert (mesh.size("tp"), mesh.size("ep")) == (4, 1)


@given(meshes)
def test_coordinates_and_ranks_are_inverse(mesh: Mesh) -> None:
    for rank in range(mesh.num_ranks):
        assert mesh.rank_at(mesh.coordinates(rank)) == rank


@given(meshes)
def test_groups_of_an_axis_partition_the_ranks(mesh: Mesh) -> None:
    for axis, size in mesh.axes:
        groups = {mesh.group(axis, rank) for rank in range(mesh.num_ranks)}
        assert all(len(group) == size for group in groups)
        assert sorted(rank for group in groups for rank in group) == list(range(mesh.num_ranks))


@pytest.mark.parametrize("axes", [(), (("tp", 0),), (("tp", 2), ("tp", 2))])
def test_nonsense_is_refused(axes: tuple[tuple[str, int], ...]) -> None:
    with pytest.raises(ConfigError):
        Mesh(axes)


@pytest.mark.parametrize("rank", [-1, 2])
def test_ranks_outside_are_refused(rank: int) -> None:
    with pytest.raises(ConfigError, match="not in a mesh"):
        Mesh((("tp", 2),)).coordinates(rank)
