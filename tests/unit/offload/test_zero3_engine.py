"""Architectures without model code of ours, under ZeRO-3: the tokens of transformers, whatever
joins, leaves, is preempted or drafted."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, MambaConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from cluster.base.env import default_cache_dir
from cluster.base.errors import ConfigError
from offload.readers.aio_build import find_ops
from offload.readers.engine import ReaderUnavailableError
from offload.zero3.inspect import RefusalError, inspect
from replicas.api import GenerationRequest, SamplingParams
from replicas.engine.speculation import SpeculationConfig
from replicas.worker.model_runner import ModelRunner
from tests.support.foreign_models import FOREIGN_NAMES, VOCAB_SIZE, write_foreign
from tests.support.in_process_engine import generate_pipelined
from tests.support.tiny_models import prompt_tokens, reference_greedy, reference_logits
from tests.support.zero3_engine import engine_over, make_zero3_runner, zero3_plan

NUM_TOKENS = 8
GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS)


def requests_of(params: SamplingParams = GREEDY) -> list[GenerationRequest]:
    return [
        GenerationRequest(
            request_id=f"r{index}",
            prompt_token_ids=tuple(prompt_tokens(length, seed=index)),
            params=params,
        )
        for index, length in enumerate((1, 5, 60, 12))
    ]


@contextlib.contextmanager
def served(path: Path, disk: Path, **changes: object) -> Iterator[ModelRunner]:
    runner = make_zero3_runner(path, zero3_plan(path, disk, **changes))
    try:
        yield runner
    finally:
        runner.weights.close()


def wanted(model: PreTrainedModel) -> list[list[int]]:
    return [reference_greedy(model, list(r.prompt_token_ids), NUM_TOKENS) for r in requests_of()]


@pytest.mark.parametrize("name", FOREIGN_NAMES)
def test_greedy_tokens_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    model = write_foreign(name, tmp_path / "model")
    with served(tmp_path / "model", tmp_path) as runner:
        completions = generate_pipelined(engine_over(runner), requests_of())
        assert [c.token_ids for c in completions] == wanted(model)


@pytest.fixture(scope="module")
def phi(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[PreTrainedModel, ModelRunner]]:
    folder = tmp_path_factory.mktemp("phi")
    model = write_foreign("phi", folder / "model")
    with served(folder / "model", folder) as runner:
        yield model, runner


Phi = tuple[PreTrainedModel, ModelRunner]


def test_requests_join_between_steps(phi: Phi) -> None:
    model, runner = phi
    engine, tokens = engine_over(runner), {}
    for request in requests_of():
        engine.add(request)
        for delta in engine.step():
            tokens.setdefault(delta.request_id, []).extend(delta.token_ids)
    while engine.has_unfinished:
        for delta in engine.step():
            tokens.setdefault(delta.request_id, []).extend(delta.token_ids)
    assert [tokens[r.request_id] for r in requests_of()] == wanted(model)


def test_an_aborted_request_leaves_the_others_alone(phi: Phi) -> None:
    model, runner = phi
    engine, tokens = engine_over(runner), {}
    for request in requests_of():
        engine.add(request)
    for _ in range(4):
        for delta in engine.step():
            tokens.setdefault(delta.request_id, []).extend(delta.token_ids)
    engine.abort("r2")
    while engine.has_unfinished:
        for delta in engine.step():
            tokens.setdefault(delta.request_id, []).extend(delta.token_ids)
    expected = wanted(model)
    assert [tokens[f"r{index}"] for index in (0, 1, 3)] == [expected[i] for i in (0, 1, 3)]


def test_preempted_requests_and_shared_prefixes_give_the_same(phi: Phi) -> None:
    model, runner = phi
    completions = engine_over(runner, num_blocks=22).generate(requests_of())
    assert [c.token_ids for c in completions] == wanted(model)
    engine = engine_over(runner)
    first, again = (engine.generate(requests_of()[2:3])[0] for _ in range(2))
    assert again.num_cached_tokens == 56
    assert again.token_ids == first.token_ids == wanted(model)[2]


def test_drafts_change_nothing(phi: Phi) -> None:
    model, runner = phi
    drafts = SpeculationConfig(num_tokens=6, min_ngram=1, max_ngram=3)
    completions = engine_over(runner, speculation=drafts).generate(requests_of())
    assert [c.token_ids for c in completions] == wanted(model)


def test_seeds_repeat_and_logprobs_are_those_of_the_model(phi: Phi) -> None:
    model, runner = phi
    params = SamplingParams(
        temperature=0.8, top_p=0.9, seed=7, max_tokens=6, logprobs=2, prompt_logprobs=0
    )
    alone = [engine_over(runner).generate([request])[0] for request in requests_of(params)]
    together = engine_over(runner).generate(requests_of(params))
    assert [c.token_ids for c in together] == [c.token_ids for c in alone]
    request, completion = requests_of(params)[1], together[1]
    text = [*request.prompt_token_ids, *completion.token_ids]
    logprobs_TV = reference_logits(model, text).log_softmax(-1)
    given = [*completion.prompt_logprobs[1:], *completion.logprobs]
    for position, logprob in enumerate(given, start=1):
        assert logprob is not None
        assert logprob.token_id == text[position]
        expected = logprobs_TV[position - 1, text[position]].item()
        assert logprob.logprob == pytest.approx(expected, abs=1e-4)


def test_weights_on_disk_give_the_same_and_the_folder_goes(tmp_path: Path) -> None:
    try:
        find_ops(default_cache_dir())
    except ReaderUnavailableError as error:
        pytest.skip(f"the disk tier cannot be used here: {error}")
    model = write_foreign("gemma2", tmp_path / "model")
    with served(tmp_path / "model", tmp_path / "disk", tier="disk") as runner:
        assert any((tmp_path / "disk" / "zero3").glob("*/zero_stage_3"))
        completions = engine_over(runner).generate(requests_of())
        assert [c.token_ids for c in completions] == wanted(model)
    assert list((tmp_path / "disk" / "zero3").iterdir()) == []


def test_the_disk_tier_without_its_reader_names_the_remedy(tmp_path: Path) -> None:
    write_foreign("phi", tmp_path / "model")
    plan = zero3_plan(tmp_path / "model", tmp_path, tier="disk")
    from offload.zero3.engine import Zero3Engine

    with pytest.raises(ConfigError, match="make ops") as caught:
        Zero3Engine(tmp_path / "model", plan, torch.float32, tmp_path / "no-cache")
    assert "device_memory" in caught.value.remedy
    assert list((tmp_path / "zero3").iterdir()) == []


def test_a_model_that_looks_ahead_is_refused_at_start(tmp_path: Path) -> None:
    config = BertConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=128,
    )
    AutoModelForCausalLM.from_config(config).float().save_pretrained(tmp_path)
    with pytest.raises((ConfigError, RefusalError), match=r"cannot be served|does not run"):
        make_zero3_runner(tmp_path, zero3_plan(tmp_path, tmp_path))


def test_recurrent_models_are_refused_by_name(tmp_path: Path) -> None:
    config = MambaConfig(vocab_size=VOCAB_SIZE, hidden_size=32, num_hidden_layers=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(RefusalError, match="MambaForCausalLM"):
        inspect(tmp_path)


def test_code_of_a_repository_is_never_run(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        '{"model_type": "stranger", "architectures": ["StrangerForCausalLM"],'
        ' "auto_map": {"AutoConfig": "stranger.Config", "AutoModelForCausalLM": "stranger.Model"}}'
    )
    (tmp_path / "stranger.py").write_text("raise SystemExit('ran')\n")
    with pytest.raises(RefusalError, match="never run"):
        inspect(tmp_path)
