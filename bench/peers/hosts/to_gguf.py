"""python to_gguf.py SOURCE CHECKPOINT TARGET: llama.cpp's own converter, tokenizer named by us.

The converter recognises tokenizers by a hash of what they make of a text and refuses others; the
seeded ones are byte-level like GPT-2's. Runs beside the converter, which is imported from SOURCE.
"""

from __future__ import annotations

import sys


def main() -> None:
    """Convert one checkpoint to bf16 GGUF."""
    source, checkpoint, target = sys.argv[1:]
    sys.path[:0] = [source, f"{source}/gguf-py"]
    import conversion.base
    import convert_hf_to_gguf

    def name_of_tokenizer(*_: object) -> str:
        return "gpt-2"

    conversion.base.TextModel.get_vocab_base_pre = name_of_tokenizer
    sys.argv = ["convert", checkpoint, "--outtype", "bf16", "--outfile", target]
    convert_hf_to_gguf.main()


if __name__ == "__main__":
    main()
