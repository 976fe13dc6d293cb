"""What the cluster file calls kernels and attention backends is what a rank knows."""

from __future__ import annotations

from typing import get_args

from cluster.base.spec import ModelSpec
from replicas.attention.select import BACKEND_NAMES
from replicas.kernels import select
from replicas.worker import worker


def words(key: str) -> tuple[str, ...]:
    return get_args(ModelSpec.model_fields[key].annotation)


def test_every_word_of_the_cluster_file_is_a_choice_of_the_rank() -> None:
    assert set(words("kernels")) == set(worker._KERNELS)
    assert set(worker._KERNELS.values()) <= set(select.CHOICES)
    assert set(words("attention_backend")) == {"auto", *BACKEND_NAMES}
