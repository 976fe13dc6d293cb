"""Small real tokenizers, trained here: byte-level BPE and sentencepiece-style BPE."""

import json
from pathlib import Path

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

CORPUS = [
    "Hello world, this is a test of the tokenizer.",
    "The quick brown fox jumps over the lazy dog.",
    "naïve café Ünïcode 日本語 and more words",
    "def f(x):\n    return x  + 1\n",
] * 4

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported') }}{% endif %}"
    "{% endfor %}"
)


def write_checkpoint(directory: Path, backend: Tokenizer, config: dict) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    backend.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return directory


def byte_level(specials: list[str]) -> Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def gpt2(directory: Path) -> Path:
    config = {
        "tokenizer_class": "GPT2Tokenizer",
        "bos_token": "<|endoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
    }
    return write_checkpoint(directory, byte_level(["<|endoftext|>"]), config)


def qwen(directory: Path) -> Path:
    """Specials only in tokenizer_config.json, add_bos_token false, NFC, ChatML."""
    backend = byte_level(["<|endoftext|>"])
    backend.normalizer = normalizers.NFC()
    first = backend.get_vocab_size()
    added = ["<|im_start|>", "<|im_end|>"]
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": False,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "additional_special_tokens": added,
        "added_tokens_decoder": {
            str(first + index): {"content": text, "special": True, "normalized": False}
            for index, text in enumerate(added)
        }
        | {str(first + 2): {"content": "<think>", "special": False, "normalized": False}},
        "chat_template": CHATML,
    }
    return write_checkpoint(directory, backend, config)


def llama3(directory: Path) -> Path:
    """Byte-level BPE whose post-processor adds BOS."""
    specials = ["<|begin_of_text|>", "<|eot_id|>"]
    backend = byte_level(specials)
    backend.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A",
        pair="<|begin_of_text|> $A <|begin_of_text|> $B",
        special_tokens=[("<|begin_of_text|>", backend.token_to_id("<|begin_of_text|>"))],
    )
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|eot_id|>",
    }
    return write_checkpoint(directory, backend, config)


def metaspace_backend() -> Tokenizer:
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    trainer = trainers.BpeTrainer(
        vocab_size=480,
        special_tokens=["<unk>", "<s>", "</s>", *byte_tokens],
        limit_alphabet=60,
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    state = json.loads(backend.to_str())
    state["added_tokens"] = [t for t in state["added_tokens"] if t["content"] not in byte_tokens]
    backend = Tokenizer.from_str(json.dumps(state))
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    return backend


def llama2(directory: Path, **config: object) -> Path:
    """Metaspace with byte fallback; the post-processor adds BOS."""
    full = {
        "tokenizer_class": "LlamaTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "add_bos_token": True,
        "add_eos_token": False,
        "chat_template": INST,
    } | config
    backend = metaspace_backend()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return write_checkpoint(directory, backend, full)


def unigram(directory: Path) -> Path:
    """A vocabulary that can spell its own control token, and a decoder without a byte table."""
    pieces = [("<unk>", 0.0), ("</s>", -1.0), ("\u2581", -2.0)]
    pieces += [(character, -5.0) for character in "abcdefghijklmnopqrstuvwxyz</>.,! é😀日"]
    pieces += [("hello", -3.0), ("\u2581hello", -3.0), ("world", -3.0)]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Metaspace()
    backend.add_special_tokens([AddedToken("</s>", normalized=False), "<unk>"])
    config = {"eos_token": "</s>", "unk_token": "<unk>"}
    return write_checkpoint(directory, backend, config)
