"""Ranks with unequal numbers of experts, as the cluster file asks for them: from YAML to tokens.

Layers differ in experts too, so that a rank may hold none of one and several of another.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from cluster.base.load import load_cluster_file
from cluster.base.plan import ModelPlan
from cluster.dist.topology import Node, Topology
from cluster.planner.hub import Hub
from cluster.planner.plan_file import plan_file
from tests.dist.test_lockstep_ranks import LoopRun, greedy
from tests.support.expert_shuffler import Shuffler
from tests.support.lockstep_ranks import LockstepRanks
from tests.support.tiny_models import prompt_tokens, reference_greedy, tiny_model, write_checkpoint

pytestmark = pytest.mark.dist

PROMPTS = [prompt_tokens(5 + 4 * index, index) for index in range(5)]
NUM_TOKENS = 12
CLUSTER = """
models:
  - name: m
    path: {path}
    device: cpu
    dtype: float32
    parallel: {{dp: {dp}, tp: {tp}}}
    kv_cache: {{memory: 1MiB}}
    moe: {moe}
    limits: {{max_context: 128, max_step_tokens: 64, max_running_requests: 8}}
"""
NODES = Topology(
    nodes=(Node(node_id="n", host="n", cores=8, memory_bytes=64 << 30, devices=()),), links=()
)
SETS = {
    "six experts on four ranks": ("mixtral", 4, 1, (2, 2, 1, 1)),
    "six, three and seven experts": ("mixtral_uneven", 2, 2, (2, 2, 2, 1)),
    "four and six residual ones on two": ("pr_moe", 2, 1, (3, 3)),
    "four and six residual ones on two by two": ("pr_moe", 2, 2, (2, 2, 1, 1)),
    "four and six residual ones on five": ("pr_moe", 5, 1, (2, 1, 1, 1, 1)),
}


def planned(folder: Path, model: str, dp: int, tp: int, moe: str) -> ModelPlan:
    """What `penstock plan` makes of a cluster file."""
    path = write_checkpoint(model, folder / model)
    Tokenizer(WordLevel({"a": 0}, unk_token="a")).save(str(path / "tokenizer.json"))
    file = folder / "cluster.yaml"
    file.write_text(CLUSTER.format(path=path, dp=dp, tp=tp, moe=moe))
    (plan,) = plan_file(load_cluster_file(file), NODES, Hub(offline=True)).models
    return plan


def oracle(model: str) -> list[list[int]]:
    reference = tiny_model(model)
    return [reference_greedy(reference, prompt, NUM_TOKENS) for prompt in PROMPTS]


@pytest.mark.parametrize("name", SETS)
def test_tokens_are_those_of_one_rank(name: str, tmp_path: Path) -> None:
    model, dp, tp, counts = SETS[name]
    plan = planned(tmp_path, model, dp, tp, "{exchange: flat}")
    assert plan.experts is not None
    assert plan.experts.experts_per_rank == counts
    ranks = LockstepRanks(plan)
    try:
        run = LoopRun(ranks)
        for index, prompt in enumerate(PROMPTS):
            run.loop.add_request(greedy(f"{index}", prompt, NUM_TOKENS))
        run.drain()
    finally:
        ranks.close()
    assert run.fatal == []
    assert [run.tokens[f"{index}"] for index in range(len(PROMPTS))] == oracle(model)


@pytest.fixture
def shuffled(tmp_path: Path) -> Iterator[LockstepRanks]:
    """PR-MoE on two nodes of two ranks, with room for copies and moves."""
    moe = "{exchange: hierarchical, redundant_experts: 1, "
    moe += "balance: {enabled: true, interval: 3600s, max_moves: 8}}"
    ranks = LockstepRanks(planned(tmp_path, "pr_moe", 2, 2, moe), ("a", "a", "b", "b"))
    yield ranks
    ranks.close()


def test_experts_of_uneven_layers_move_under_load(shuffled: LockstepRanks) -> None:
    expected = oracle("pr_moe")
    run, rng, shuffler = LoopRun(shuffled), random.Random(4), Shuffler(shuffled)
    try:
        for number in range(30):
            index = rng.randrange(len(PROMPTS))
            run.loop.add_request(greedy(f"{number} {index}", PROMPTS[index], NUM_TOKENS))
            time.sleep(rng.choice((0.0, 0.05, 0.1)))
        run.drain()
    finally:
        used = shuffler.stop()
    assert run.fatal == []
    assert used >= 3
    for name, tokens in run.tokens.items():
        assert tokens == expected[int(name.split()[1])]
