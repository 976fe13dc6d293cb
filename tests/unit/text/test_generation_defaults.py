import json

import pytest

from cluster.base.errors import ConfigError, CorruptWeightsError
from replicas.text.generation_defaults import GenerationDefaults


def load(tmp_path, generation=None, config=None):
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    return GenerationDefaults.from_directory(tmp_path)


def test_no_files_say_nothing(tmp_path):
    assert load(tmp_path) == GenerationDefaults()


def test_every_field(tmp_path):
    found = load(
        tmp_path,
        {
            "do_sample": True,
            "temperature": 0.7,
            "top_k": 20,
            "top_p": 0.8,
            "min_p": 0.05,
            "repetition_penalty": 1.1,
            "eos_token_id": [3, 4, 3],
            "max_new_tokens": 64,
            "pad_token_id": 0,
            "transformers_version": "5.0.0",
        },
        {"eos_token_id": 9},
    )
    assert found == GenerationDefaults(
        temperature=0.7,
        top_k=20,
        top_p=0.8,
        min_p=0.05,
        repetition_penalty=1.1,
        eos_token_ids=(3, 4),
        max_new_tokens=64,
    )


def test_eos_falls_back_to_the_model_config(tmp_path):
    assert load(tmp_path, {}, {"eos_token_id": 2}).eos_token_ids == (2,)


def test_do_sample_false_is_greedy_and_drops_filters(tmp_path):
    found = load(tmp_path, {"do_sample": False, "temperature": 0.9, "top_p": 0.5})
    assert (found.temperature, found.top_p) == (0.0, None)


def test_do_sample_absent_keeps_what_is_there(tmp_path):
    found = load(tmp_path, {"top_p": 0.5})
    assert (found.temperature, found.top_p) == (None, 0.5)


def test_keys_that_are_not_followed_are_named_once(tmp_path, caplog):
    found = load(tmp_path, {"num_beams": 4, "typical_p": 1.0, "suppress_tokens": [1]})
    assert found.ignored_keys == ("num_beams", "suppress_tokens")
    assert caplog.text.count("num_beams") == 1


@pytest.mark.parametrize(
    "generation",
    [
        {"temperature": "hot"},
        {"temperature": -1},
        {"temperature": True},
        {"temperature": float("nan")},
        {"top_k": 1.5},
        {"top_p": 0},
        {"top_p": 1.1},
        {"repetition_penalty": 0},
        {"max_new_tokens": 0},
        {"eos_token_id": "2"},
        {"eos_token_id": [-1]},
    ],
)
def test_wrong_values_are_refused(tmp_path, generation):
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, generation)
    assert caught.value.param == next(iter(generation))


def test_broken_json(tmp_path):
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CorruptWeightsError):
        GenerationDefaults.from_directory(tmp_path)
