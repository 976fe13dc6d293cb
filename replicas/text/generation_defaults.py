"""A checkpoint's own sampling defaults, from generation_config.json and config.json.

`None` means the checkpoint says nothing and the neutral value applies. Follows vLLM in what a
server takes over, and transformers in one point that vLLM drops: `do_sample: false` written out
means greedy, so temperature becomes 0 and the sampling filters next to it are not taken over.
Without `do_sample`, values that are present apply and absent ones stay neutral (temperature 1.0).
A key that would change decoding in a way this engine does not do is named once in the log.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.base.errors import ConfigError
from replicas.text.tokenizer_files import read_json_object

_LOG = logging.getLogger(__name__)

_NEUTRAL_IF_UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "assistant_confidence_threshold": (),
    "bad_words_ids": (),
    "begin_suppress_tokens": (),
    "diversity_penalty": (0, 0.0),
    "encoder_repetition_penalty": (1, 1.0),
    "epsilon_cutoff": (0, 0.0),
    "eta_cutoff": (0, 0.0),
    "exponential_decay_length_penalty": (),
    "force_words_ids": (),
    "forced_bos_token_id": (),
    "forced_decoder_ids": (),
    "forced_eos_token_id": (),
    "guidance_scale": (1, 1.0),
    "length_penalty": (1, 1.0),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "no_repeat_ngram_size": (0,),
    "num_beam_groups": (1,),
    "num_beams": (1,),
    "penalty_alpha": (0, 0.0),
    "sequence_bias": (),
    "stop_strings": (),
    "suppress_tokens": (),
    "top_h": (),
    "typical_p": (1, 1.0),
}
"""Decoding keys that are not taken over, with the values at which they change nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationDefaults:
    """What a request gets for the sampling fields it leaves unset."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    eos_token_ids: tuple[int, ...] = ()
    max_new_tokens: int | None = None
    ignored_keys: tuple[str, ...] = ()
    """Keys of generation_config.json that would change decoding and are not followed."""

    @classmethod
    def from_directory(cls, path: str | Path) -> GenerationDefaults:
        """Read both files; a missing one counts as empty.

        Raises:
            ConfigError: a value has the wrong type or is out of range.
            CorruptWeightsError: a file is not a JSON object.
        """
        root = Path(path)
        model_config = read_json_object(root / "config.json") or {}
        generation = read_json_object(root / "generation_config.json") or {}
        reader = _Reader(root / "generation_config.json", generation)
        ignored = _unsupported_keys(generation)
        if ignored:
            _LOG.warning("%s: not followed: %s", reader.path, ", ".join(ignored))
        sampling = reader.sampling()
        return cls(
            **sampling,
            repetition_penalty=reader.number("repetition_penalty", above=0.0),
            eos_token_ids=_eos_ids(reader.path, generation, model_config),
            max_new_tokens=reader.integer("max_new_tokens", at_least=1),
            ignored_keys=ignored,
        )


class _Reader:
    """Typed look-ups in generation_config.json; null counts as absent."""

    def __init__(self, path: Path, values: Mapping[str, Any]) -> None:
        self.path = path
        self._values = values

    def sampling(self) -> dict[str, Any]:
        """Temperature and filters, after `do_sample`."""
        if self._values.get("do_sample") is False:
            return {"temperature": 0.0}
        return {
            "temperature": self.number("temperature", at_least=0.0),
            "top_k": self.integer("top_k", at_least=0),
            "top_p": self.number("top_p", above=0.0, at_most=1.0),
            "min_p": self.number("min_p", at_least=0.0, at_most=1.0),
        }

    def number(
        self,
        key: str,
        *,
        at_least: float = -math.inf,
        above: float = -math.inf,
        at_most: float = math.inf,
    ) -> float | None:
        """A finite number in range, or None."""
        value = self._values.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._error(key, value)
        if not math.isfinite(value) or value < at_least or value <= above or value > at_most:
            raise self._error(key, value)
        return float(value)

    def integer(self, key: str, *, at_least: int) -> int | None:
        """A whole number, or None."""
        value = self._values.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
            raise self._error(key, value)
        return value

    def _error(self, key: str, value: Any) -> ConfigError:
        return ConfigError(
            f"{self.path}: {key} is {value!r}, which is not a valid value.",
            "Mend or remove it.",
            param=key,
        )


def _eos_ids(
    path: Path, generation: Mapping[str, Any], model: Mapping[str, Any]
) -> tuple[int, ...]:
    value = generation.get("eos_token_id")
    if value is None:
        value = model.get("eos_token_id")
    if value is None:
        return ()
    ids = value if isinstance(value, list) else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
        raise ConfigError(
            f"{path}: eos_token_id is {value!r}, not token ids.", param="eos_token_id"
        )
    return tuple(dict.fromkeys(ids))


def _unsupported_keys(generation: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(
        key
        for key, neutral in _NEUTRAL_IF_UNSUPPORTED.items()
        if generation.get(key) is not None and generation[key] not in neutral
    )
