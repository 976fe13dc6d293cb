"""Turns the corpus into one long row of token ids and draws training batches from it.

A batch depends on the seed and the step number alone, so a run can stop and go on at any step and
two runs with equal step counts see equal data.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from examples.models.chat_documents import chat_documents
from examples.models.corpus import Corpus
from examples.models.demo_tokenizer import END_OF_TEXT_ID, render_chat

MEAN_CHARS_PER_PIECE = 150
TokenRow = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingData:
    """The token row and what went into it."""

    tokens: TokenRow
    num_files: int
    num_chats: int
    chat_tokens: int


def build_training_data(
    corpus: Corpus, tokenizer: Tokenizer, seed: int, chat_share: float = 0.15
) -> TrainingData:
    """Tokenise files and conversations, shuffle them, and join them by `<|endoftext|>`."""
    num_bytes = sum(file.num_bytes for file in corpus.train)
    chats = chat_documents(corpus.train, int(num_bytes * chat_share / (1 - chat_share)), seed)
    chat_ids = [
        encoding.ids for encoding in tokenizer.encode_batch([render_chat(chat) for chat in chats])
    ]
    rng = random.Random(seed)
    file_ids = [_encode_with_cuts(file.text, tokenizer, rng) for file in corpus.train]
    documents = file_ids + chat_ids
    random.Random(seed).shuffle(documents)
    row = [token for ids in documents for token in (END_OF_TEXT_ID, *ids)]
    return TrainingData(
        tokens=np.asarray(row, dtype=np.int64),
        num_files=len(file_ids),
        num_chats=len(chat_ids),
        chat_tokens=sum(len(ids) for ids in chat_ids),
    )


def cut_like_prompts(text: str, rng: random.Random) -> list[str]:
    """Split `text` at random places, half of them right behind a space.

    A prompt may end anywhere, and its last token then differs from what the tokenizer would make of
    the whole text: `def ` ends in a lone space that ordinary text never shows before a name. Pieces
    tokenised one by one show the model such seams.
    """
    pieces = []
    start = 0
    while start < len(text):
        end = start + 1 + int(rng.expovariate(1 / MEAN_CHARS_PER_PIECE))
        if rng.random() < 0.5:
            space = text.find(" ", end)
            end = space + 1 if space >= 0 else len(text)
        pieces.append(text[start:end])
        start = end
    return pieces


def _encode_with_cuts(text: str, tokenizer: Tokenizer, rng: random.Random) -> list[int]:
    encodings = tokenizer.encode_batch(cut_like_prompts(text, rng))
    return [token for encoding in encodings for token in encoding.ids]


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchSampler:
    """Draws windows of a random length at random places; every batch holds `batch_tokens`.

    Short windows train faster and long ones teach the whole context, hence the mixture.
    """

    tokens: TokenRow
    seed: int
    batch_tokens: int
    lengths: tuple[int, ...]
    length_shares: tuple[float, ...]

    def batch(self, step: int) -> TokenRow:
        """The batch of `step`: token ids, [batch_tokens / length, length]."""
        rng = np.random.default_rng([self.seed, step])
        length = int(rng.choice(self.lengths, p=self.length_shares))
        rows = self.batch_tokens // length
        starts = rng.integers(0, len(self.tokens) - length + 1, size=rows)
        batch: TokenRow = self.tokens[starts[:, None] + np.arange(length)[None, :]]
        return batch
