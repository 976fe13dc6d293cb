"""python transformers_host.py CHECKPOINT THREADS: `generate`, batches asked for over a pipe.

Speaks as `vllm_host.py` does. Prefill ends when the first logits are there, which a logits
processor sees: `generate` itself tells only when everything is done.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any


class FirstLogits:
    """Notes when it is called first and changes nothing."""

    def __init__(self) -> None:
        self.at_s = 0.0

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        self.at_s = self.at_s or time.perf_counter()
        return scores


def main() -> None:
    """Serve batches until standard input ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    import torch
    import transformers

    torch.set_num_threads(int(sys.argv[2]))
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        sys.argv[1], dtype=torch.bfloat16
    )
    model.eval()
    print(json.dumps({"ready": f"transformers {transformers.__version__}"}), file=answers)
    for line in sys.stdin:
        wish = json.loads(line)
        generator = torch.Generator().manual_seed(wish["seed"])
        shape = (wish["batch"], wish["prompt"])
        ids = torch.randint(10, model.config.vocab_size, shape, generator=generator)
        first = FirstLogits()
        started_s = time.perf_counter()
        with torch.inference_mode():
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                min_new_tokens=wish["new"],
                max_new_tokens=wish["new"],
                pad_token_id=0,
                logits_processor=[first],
            )
        times = {"prefill_s": first.at_s - started_s, "decode_s": time.perf_counter() - first.at_s}
        decoded = wish["batch"] * (wish["new"] - 1)
        print(json.dumps({**times, "decode_tokens": decoded}), file=answers)


if __name__ == "__main__":
    main()
