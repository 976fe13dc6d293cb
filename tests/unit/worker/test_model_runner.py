"""The runner over a fake model whose answers depend on every token of the context."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cluster.base.errors import InternalError
from replicas.api import Pooling, SamplingParams
from replicas.engine.scheduler_output import SchedulerOutput
from replicas.sampling.sampler import NOT_FINITE
from tests.support.fake_decoder import BLOCK_SIZE, VOCAB_SIZE, FakeDecoder
from tests.support.runner_driver import RunnerDriver

PROMPT = [7, 3, 3, 9, 1, 44, 2, 18, 30, 5, 5]
GREEDY = SamplingParams(temperature=0.0)


def oracle_logits(tokens: list[int]) -> torch.Tensor:
    """Logits at every position, without any cache."""
    model = FakeDecoder()
    entry = model._embedding_VD[tokens] + model._positions_ND[: len(tokens)]
    counts = torch.arange(1, len(tokens) + 1).unsqueeze(1)
    hidden = torch.tanh((entry.double().cumsum(0) / counts).float()) + entry
    return hidden @ model._head_DV


def oracle_greedy(tokens: list[int], count: int) -> list[int]:
    tokens = list(tokens)
    for _ in range(count):
        tokens.append(int(oracle_logits(tokens)[-1].argmax()))
    return tokens[-count:]


def test_greedy_generation_matches_a_cacheless_oracle() -> None:
    driver = RunnerDriver()
    driver.add(0, PROMPT)
    assert driver.generate(0, 12) == oracle_greedy(PROMPT, 12)


def test_requests_of_a_mixed_batch_do_not_meet() -> None:
    prompts = {0: PROMPT, 1: [1, 2], 2: [50, 50, 50, 4, 9, 9]}
    sampled = SamplingParams(temperature=0.9, top_p=0.8, seed=4)
    alone = {}
    for key, prompt in prompts.items():
        driver = RunnerDriver()
        driver.add(key, prompt, sampled if key == 1 else GREEDY)
        alone[key] = driver.generate(key, 6)
    driver = RunnerDriver()
    for key, prompt in prompts.items():
        driver.add(key, prompt, sampled if key == 1 else GREEDY)
    driver.step({0: 4, 1: 2, 2: 5})
    driver.step({2: 1, 1: 1, 0: 7})
    for _ in range(5):
        driver.step({1: 1, 0: 1, 2: 1})
    for key, prompt in prompts.items():
        assert driver.tokens[key][len(prompt) :][:6] == alone[key]


@pytest.mark.parametrize("chunks", [[11], [4, 7], [1] * 11, [3, 5, 2, 1]])
def test_chunks_do_not_change_prompt_logprobs_or_embeddings(chunks: list[int]) -> None:
    driver = RunnerDriver()
    driver.add(0, PROMPT, SamplingParams(temperature=0.0, prompt_logprobs=3, logprobs=1))
    driver.add(1, PROMPT, pooling=Pooling.MEAN)
    driver.add(2, PROMPT, pooling=Pooling.LAST)
    scored, results = [], {}
    for index, chunk in enumerate(chunks):
        results = driver.step({2: chunk, 0: chunk, 1: chunk})
        scored += results[0].prompt_logprobs if 0 in results else []
        if index < len(chunks) - 1:
            assert 1 not in results
            assert 2 not in results
    expected = oracle_logits(PROMPT).log_softmax(-1)
    assert [entry.token_id for entry in scored] == PROMPT[1:]
    for position, entry in enumerate(scored, start=1):
        line = expected[position - 1]
        assert entry.logprob == pytest.approx(float(line[PROMPT[position]]), abs=1e-4)
        assert [token for token, _ in entry.top] == line.topk(3).indices.tolist()
    (first,) = results[0].logprobs
    assert first.token_id == results[0].token_ids[0] == int(expected[-1].argmax())
    assert first.rank == 1
    hidden = hidden_states(PROMPT)
    np.testing.assert_allclose(results[1].embedding, hidden.mean(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(results[2].embedding, hidden[-1], rtol=1e-4, atol=1e-5)


def hidden_states(tokens: list[int]) -> torch.Tensor:
    return torch.linalg.lstsq(FakeDecoder()._head_DV.T, oracle_logits(tokens).T).solution.T


def test_mean_pooling_starts_again_after_preemption() -> None:
    driver = RunnerDriver()
    driver.add(0, PROMPT, pooling=Pooling.MEAN)
    driver.step({0: 6})
    driver.finish(0)
    driver.add(0, PROMPT, pooling=Pooling.MEAN)
    result = driver.step({0: 11})[0]
    np.testing.assert_allclose(
        result.embedding, hidden_states(PROMPT).mean(0), rtol=1e-4, atol=1e-5
    )


def test_mean_pooling_refuses_to_average_a_part() -> None:
    driver = RunnerDriver()
    driver.add(0, PROMPT, pooling=Pooling.MEAN)
    driver.add(1, PROMPT, pooling=Pooling.LAST)
    # As if the first block had come from the prefix cache.
    driver._computed[0] = BLOCK_SIZE
    results = driver.step({0: 7, 1: 11})
    assert "saw 7 of 11 prompt tokens" in results[0].error
    assert results[0].embedding == ()
    assert results[1].error == ""


def test_scores_only_come_from_the_prompt() -> None:
    driver = RunnerDriver()
    params = SamplingParams(temperature=0.0, prompt_logprobs=0)
    # Back from preemption: the last three tokens are output.
    driver.add(0, PROMPT, params, num_prompt=8)
    result = driver.step({0: 11})[0]
    assert [entry.token_id for entry in result.prompt_logprobs] == PROMPT[1:8]
    assert result.token_ids


def test_long_prompts_are_scored_in_slices() -> None:
    driver = RunnerDriver()
    prompts = [[(5 * i + key) % VOCAB_SIZE for i in range(200)] for key in range(2)]
    for key, prompt in enumerate(prompts):
        driver.add(key, prompt, SamplingParams(temperature=0.0, prompt_logprobs=0))
    results = driver.step({0: 200, 1: 200})
    assert driver.model.num_logits_rows == [256, 142, 2]
    for key, prompt in enumerate(prompts):
        expected = oracle_logits(prompt).log_softmax(-1)
        got = [entry.logprob for entry in results[key].prompt_logprobs]
        wanted = expected[torch.arange(199), torch.tensor(prompt[1:])]
        np.testing.assert_allclose(got, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nan_ends_one_request_only(temperature: float) -> None:
    params = SamplingParams(temperature=temperature, seed=3, prompt_logprobs=0, logprobs=0)
    healthy = RunnerDriver()
    healthy.add(1, PROMPT, params)
    expected = healthy.generate(1, 3)
    driver = RunnerDriver(FakeDecoder(poison=frozenset({52})))
    driver.add(0, [4, 52], params)
    driver.add(1, PROMPT, params)
    results = driver.step({0: 2, 1: 11})
    assert results[0].error == NOT_FINITE
    assert results[0].token_ids == ()
    assert results[1].error == ""
    driver.finish(0)
    driver.step({1: 1})
    driver.step({1: 1})
    assert driver.tokens[1][11:] == expected


def test_a_failed_row_lives_through_the_step_that_was_planned_on_top() -> None:
    driver = RunnerDriver(FakeDecoder(poison=frozenset({52})))
    driver.add(0, [4, 52], SamplingParams(temperature=1.0, seed=3))
    driver.add(1, PROMPT)
    driver.step({0: 2, 1: 11})
    results = driver.step({0: 1, 1: 1})
    assert results[0].error == NOT_FINITE
    assert results[0].token_ids == ()
    assert driver.tokens[1][11:] == oracle_greedy(PROMPT, 2)
    # The failure is known now: a plan that still names the row means that other ranks disagree.
    with pytest.raises(InternalError, match="on this rank only"):
        driver.step({0: 1, 1: 1})


def test_every_rank_keeps_the_tokens_it_sampled() -> None:
    params = SamplingParams(temperature=1.0, seed=5, presence_penalty=0.4, logprobs=2)
    drivers = [RunnerDriver(is_output_rank=True), RunnerDriver(is_output_rank=False)]
    for driver in drivers:
        driver.add(0, PROMPT, params)
        driver.generate(0, 6)
    rows = [driver.runner._rows for driver in drivers]
    assert rows[0].token_ids_SC.tolist() == rows[1].token_ids_SC.tolist()
    assert rows[0].num_tokens_S.tolist() == rows[1].num_tokens_S.tolist()
    slot = int(rows[0].slots((0,))[0])
    assert rows[0].token_ids_SC[slot, : 11 + 6].tolist() == drivers[0].tokens[0]


def test_nan_embedding_and_impossible_tokens_are_errors_of_their_request() -> None:
    driver = RunnerDriver(FakeDecoder(poison=frozenset({52})))
    driver.add(0, [4, 52], pooling=Pooling.MEAN)
    driver.add(1, [4, VOCAB_SIZE + 100])
    driver.add(2, PROMPT)
    results = driver.step({0: 2, 1: 2, 2: 11})
    assert "not finite" in results[0].error
    assert "outside the vocabulary" in results[1].error
    assert results[1].token_ids == ()
    assert results[2].token_ids == (oracle_greedy(PROMPT, 1)[0],)


def test_preemption_and_replay_continue_a_sampled_stream() -> None:
    params = SamplingParams(
        temperature=1.0, seed=11, presence_penalty=0.7, frequency_penalty=0.2, top_k=30
    )
    whole = RunnerDriver()
    whole.add(0, PROMPT, params)
    expected = whole.generate(0, 10)
    assert len(set(expected)) > 3
    driver = RunnerDriver()
    driver.add(0, PROMPT, params)
    first = driver.generate(0, 4)
    driver.finish(0)
    driver.add(0, PROMPT + first, params, num_prompt=len(PROMPT))
    assert first + driver.generate(0, 6) == expected


def test_forked_choice_with_copied_block_continues_on_its_own() -> None:
    driver = RunnerDriver()
    driver.add(0, PROMPT)
    expected = driver.generate(0, 5)
    # A second choice shares two full blocks and gets a copy of the third.
    tokens = PROMPT + expected[:1]
    driver.add(1, tokens)
    driver.blocks[1] = driver.blocks[0][:3]
    copied = 60
    plan_rows = driver.blocks[1]
    request = driver._news.pop()
    output = driver.runner.execute(
        SchedulerOutput(
            step=99,
            new_requests=(request,),
            keys=(1,),
            num_scheduled_tokens=(1,),
            num_computed_tokens=(len(PROMPT),),
            new_block_ids=(tuple(plan_rows),),
            replaced_blocks=((1, 2, copied),),
            block_copies=((plan_rows[2], copied),),
            samples=(True,),
        )
    )
    assert output.results[0].token_ids == (expected[1],)
    cache = driver.kv_caches[0]
    assert torch.equal(cache[0, copied, :3], cache[0, plan_rows[2], :3])


def test_other_ranks_make_the_same_logits_calls_and_say_nothing() -> None:
    drivers = [RunnerDriver(is_output_rank=True), RunnerDriver(is_output_rank=False)]
    params = SamplingParams(temperature=0.0, prompt_logprobs=1, logprobs=1)
    for driver in drivers:
        driver.add(0, PROMPT, params)
        driver.add(1, PROMPT, pooling=Pooling.MEAN)
        driver.step({0: 5, 1: 11})
        driver.step({0: 6})
    assert drivers[0].model.num_logits_rows == drivers[1].model.num_logits_rows == [5, 5, 1]
    assert drivers[0].output.results
    assert drivers[1].output.results == ()
    assert torch.equal(drivers[0].kv_caches[0], drivers[1].kv_caches[0])


def test_a_plan_without_tokens_frees_rows() -> None:
    driver = RunnerDriver()
    driver.add(0, PROMPT)
    driver.generate(0, 1)
    assert driver.runner.num_rows == 1
    driver.finish(0)
    assert driver.step({}) == {}
    assert driver.runner.num_rows == 0
    assert driver.output.step == 1


def test_timings_cover_the_step() -> None:
    driver = RunnerDriver()
    driver.add(0, PROMPT)
    driver.step({0: 11})
    # The clock ticks once per reading.
    assert driver.output.timings_s == {"input_build": 1.0, "forward": 1.0, "sample": 1.0}
    assert driver.output.duration_s == 3.0


def test_a_plan_for_an_unknown_request_is_an_internal_error() -> None:
    plan = SchedulerOutput(
        step=0,
        keys=(5,),
        num_scheduled_tokens=(1,),
        num_computed_tokens=(0,),
        new_block_ids=((),),
        samples=(True,),
    )
    with pytest.raises(InternalError, match="request 5, which has no row"):
        RunnerDriver().runner.execute(plan)
