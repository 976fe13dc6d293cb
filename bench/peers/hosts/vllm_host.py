"""python vllm_host.py CHECKPOINT: vLLM in its own environment, batches asked for over a pipe.

Reads one JSON object a line and answers each with one: {"batch", "prompt", "new", "seed"} ->
{"prefill_s", "decode_s", "decode_tokens"}. Imports only vLLM and the standard library. What vLLM
prints goes to standard error, so that the answers stay alone on standard output.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from typing import Any

MAX_CONTEXT = 1024


def run(llm: Any, sampling: Any, wish: dict[str, int]) -> dict[str, float]:
    """One batch, stepped as the engine steps: until all have their first token, then the rest."""
    engine = llm.llm_engine
    vocab_size = llm.model_config.get_vocab_size()
    numbers = random.Random(wish["seed"])
    waiting = set()
    for index in range(wish["batch"]):
        waiting.add(f"{wish['seed']}-{index}")
        ids = [numbers.randrange(10, vocab_size) for _ in range(wish["prompt"])]
        engine.add_request(f"{wish['seed']}-{index}", {"prompt_token_ids": ids}, sampling)
    given = 0
    started_s = time.perf_counter()
    while waiting:
        for part in engine.step():
            given += len(part.outputs[0].token_ids)
            waiting.discard(part.request_id)
    filled_s = time.perf_counter()
    while engine.has_unfinished_requests():
        engine.step()
    return {
        "prefill_s": filled_s - started_s,
        "decode_s": time.perf_counter() - filled_s,
        "decode_tokens": wish["batch"] * wish["new"] - given,
    }


def main() -> None:
    """Serve batches until standard input ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    import vllm
    from vllm.sampling_params import RequestOutputKind

    llm = vllm.LLM(
        model=sys.argv[1],
        dtype="bfloat16",
        max_model_len=MAX_CONTEXT,
        enable_prefix_caching=False,
        disable_log_stats=True,
    )
    print(json.dumps({"ready": f"vLLM CPU {vllm.__version__}"}), file=answers)
    for line in sys.stdin:
        wish = json.loads(line)
        sampling = vllm.SamplingParams(
            temperature=0.0,
            max_tokens=wish["new"],
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        print(json.dumps(run(llm, sampling, wish)), file=answers)


if __name__ == "__main__":
    main()
