"""Text to token ids and back for one checkpoint, on the `tokenizers` library.

Invariants: a control token's id never comes out of text that a user wrote (its string is encoded as
plain characters); only `encode_template` maps control strings to ids, and only those the template
itself wrote. What is added around a prompt (BOS, EOS) equals transformers' AutoTokenizer for
tokenizers that it loads from tokenizer.json. Instances are immutable and safe to share by threads.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import AddedToken
from tokenizers import Tokenizer as BackendTokenizer

from cluster.base.errors import ConfigError, CorruptWeightsError, InvalidRequestError
from replicas.text.control_text import GUARD, SpecialFinder, check_plain_text
from replicas.text.token_bytes import TokenBytes
from replicas.text.tokenizer_files import AddedTokenSpec, TokenizerFiles, read_tokenizer_files

_LOG = logging.getLogger(__name__)

_SHORT_CHARS = 4_096


class Tokenizer:
    """One checkpoint's tokenizer; build it with `from_directory`."""

    def __init__(self, files: TokenizerFiles) -> None:
        backend = _load_backend(files)
        _add_missing_tokens(backend, files)
        self._backend = backend
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        """Token ids that exist, added tokens included."""
        self.special_ids: frozenset[int] = _special_ids(backend)
        self.eos_token_ids: tuple[int, ...] = _ids_of(backend, files.named.get("eos_token"))
        self._control_ids = self.special_ids.difference(
            _ids_of(backend, files.named.get("unk_token"))
        )
        self._prefix, self._suffix = _framing(backend, files)
        self._finder = SpecialFinder(_special_specs(backend, files, self.special_ids))
        self.token_bytes = TokenBytes.from_backend(backend)
        """Exact bytes per token where the decoder allows it, else None."""
        # Added last: it must not count as vocabulary. Text after an added token is encoded as
        # text in mid-stream (no sentencepiece prefix space), which encode_template relies on.
        self._guard_id: int = _add_guard(backend)
        backend.encode_special_tokens = True
        self._token_texts: dict[int, str] = {}
        self._anchor_ids = self._as_text("a")
        self._anchor_length = len(self.decode(self._anchor_ids))

    @classmethod
    def from_directory(cls, path: str | Path) -> Tokenizer:
        """Load tokenizer.json and tokenizer_config.json.

        Raises:
            ConfigError: no tokenizer.json, or its ids contradict tokenizer_config.json.
            CorruptWeightsError: a file is damaged.
        """
        return cls(read_tokenizer_files(path))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of text a user wrote; control-token strings in it stay text.

        Args:
            text: the text.
            add_special_tokens: put BOS (and EOS) around it where the checkpoint says so.

        Raises:
            InvalidRequestError: the text holds something that is not a Unicode character.
        """
        check_plain_text(text)
        ids = self._as_text(text)
        return [*self._prefix, *ids, *self._suffix] if add_special_tokens else ids

    def encode_template(self, text: str) -> list[int]:
        """Token ids of a rendered chat template; adds nothing around it.

        Control strings that the template wrote become control ids; those that came in through a
        message (marked by `ChatTemplate.render`) become plain text tokens.
        """
        pieces, control_ids = self._finder.split(text)
        ids = self._as_text(GUARD.join(pieces), keep_guard=True)
        remaining = iter(control_ids)
        return [next(remaining) if token_id == self._guard_id else token_id for token_id in ids]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids; ids outside the vocabulary print nothing."""
        text: str = self._backend.decode(
            [token_id for token_id in ids if token_id != self._guard_id],
            skip_special_tokens=skip_special_tokens,
        )
        return text

    def token_text(self, token_id: int) -> str:
        """What one token prints in the middle of a text; U+FFFD for part of a character."""
        text = self._token_texts.get(token_id)
        if text is None:
            both = [*self._anchor_ids, token_id]
            text = self.decode(both, skip_special_tokens=False)[self._anchor_length :]
            # The cache cannot outgrow the vocabulary: other ids are not kept.
            if 0 <= token_id < self.vocab_size:
                self._token_texts[token_id] = text
        return text

    def _as_text(self, text: str, keep_guard: bool = False) -> list[int]:
        ids = self._backend_ids(text)
        if not self._leaks(ids):
            return ids
        # A vocabulary may spell a control token from plain characters (unigram models do).
        encoding = self._backend.encode(text, add_special_tokens=False)
        cuts = [
            start + 1
            for token_id, (start, end) in zip(encoding.ids, encoding.offsets, strict=True)
            if end > start and self._leaks((token_id,))
        ]
        return self._encode_cut(text, cuts, keep_guard)

    def _backend_ids(self, text: str) -> list[int]:
        if len(text) <= _SHORT_CHARS:
            ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
            return ids
        # The batch call lets other threads run meanwhile, the single one does not.
        (encoding,) = self._backend.encode_batch_fast([text], add_special_tokens=False)
        ids = encoding.ids
        return ids

    def _leaks(self, ids: Iterable[int]) -> bool:
        """Whether plain text became a control token (the unknown token is a fair answer)."""
        return not self._control_ids.isdisjoint(ids)

    def _encode_cut(self, text: str, cuts: Sequence[int], keep_guard: bool) -> list[int]:
        bounds = [*cuts, len(text)]
        ids: list[int] = self._backend_ids(text[: bounds[0]])
        for start, end in itertools.pairwise(bounds):
            ids += self._backend_ids(GUARD + text[start:end])[1:]
        if self._leaks(ids):
            raise InvalidRequestError(
                "The text spells a control token of this model.", "Remove it from the text."
            )
        return ids if keep_guard else [token_id for token_id in ids if token_id != self._guard_id]


def _load_backend(files: TokenizerFiles) -> BackendTokenizer:
    try:
        backend = BackendTokenizer.from_str(files.backend_json)
    except Exception as error:  # the library raises a bare Exception for every bad file
        raise CorruptWeightsError(
            f"{files.directory / 'tokenizer.json'} is not a valid tokenizer: {error}.",
            "Download the checkpoint again.",
        ) from error
    backend.no_truncation()
    backend.no_padding()
    return backend


def _add_missing_tokens(backend: BackendTokenizer, files: TokenizerFiles) -> None:
    """Add what only tokenizer_config.json declares, in the order transformers uses."""
    for spec in files.added:
        backend.add_tokens([_added_token(spec)])
        if backend.token_to_id(spec.content) != spec.token_id:
            raise ConfigError(
                f"{files.directory}: tokenizer_config.json gives {spec.content!r} the id "
                f"{spec.token_id}, tokenizer.json makes it {backend.token_to_id(spec.content)}."
            )
    by_content = {spec.content: spec for spec in files.added}
    for content in (*files.named.values(), *files.extra_specials):
        spec = by_content.get(content) or AddedTokenSpec(content=content, normalized=False)
        backend.add_special_tokens([_added_token(spec, special=True)])


def _added_token(spec: AddedTokenSpec, special: bool = False) -> AddedToken:
    return AddedToken(
        spec.content,
        single_word=spec.single_word,
        lstrip=spec.lstrip,
        rstrip=spec.rstrip,
        normalized=spec.normalized,
        special=special or spec.special,
    )


def _add_guard(backend: BackendTokenizer) -> int:
    backend.add_tokens([AddedToken(GUARD, special=False, normalized=False)])
    return next(iter(_ids_of(backend, GUARD)))


def _special_ids(backend: BackendTokenizer) -> frozenset[int]:
    added = backend.get_added_tokens_decoder()
    return frozenset(token_id for token_id, token in added.items() if token.special)


def _special_specs(
    backend: BackendTokenizer, files: TokenizerFiles, special_ids: frozenset[int]
) -> list[tuple[AddedTokenSpec, int]]:
    by_content = {spec.content: spec for spec in files.added}
    contents = {token_id: backend.id_to_token(token_id) or "" for token_id in sorted(special_ids)}
    return [
        (by_content.get(content) or AddedTokenSpec(content=content), token_id)
        for token_id, content in contents.items()
    ]


def _ids_of(backend: BackendTokenizer, content: str | None) -> tuple[int, ...]:
    token_id = None if content is None else backend.token_to_id(content)
    return () if token_id is None else (token_id,)


def _framing(backend: BackendTokenizer, files: TokenizerFiles) -> tuple[list[int], list[int]]:
    """Ids before and after a prompt: what the post-processor of tokenizer.json adds.

    As in transformers >= 5, add_bos_token and add_eos_token of tokenizer_config.json do not count;
    where they say otherwise the log names it.
    """
    body = backend.encode("a", add_special_tokens=False).ids
    framed = backend.encode("a", add_special_tokens=True).ids
    starts = range(len(framed) - len(body) + 1)
    start = next((at for at in starts if framed[at : at + len(body)] == body), None)
    if start is None:
        raise ConfigError(f"{files.directory}: the tokenizer's post-processor rewrites its input.")
    prefix, suffix = framed[:start], framed[start + len(body) :]
    for key, added in (("add_bos_token", prefix), ("add_eos_token", suffix)):
        if key in files.config and bool(files.config[key]) != bool(added):
            _LOG.warning(
                "%s: %s is %s, but tokenizer.json decides and adds %s",
                *(files.directory, key, files.config[key], added or "nothing"),
            )
    return prefix, suffix
