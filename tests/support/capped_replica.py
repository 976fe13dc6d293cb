"""Serves prompts from streamed weights and prints the tokens; a module to run in a cgroup."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from replicas.api import GenerationRequest, SamplingParams
from tests.support.offload_engine import offload_engine, offload_plan

NUM_TOKENS = 6


def requests() -> list[GenerationRequest]:
    return [
        GenerationRequest(
            request_id=f"r{index}",
            prompt_token_ids=tuple((7 * place + index) % 131 for place in range(length)),
            params=SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True),
        )
        for index, length in enumerate((3, 11))
    ]


def main(path: str, disk: str, device_bytes: int) -> None:
    plan = offload_plan(Path(disk), device_bytes=device_bytes, reader="auto", verify="first")
    completions = offload_engine(Path(path), plan).generate(requests())
    sys.stdout.write(json.dumps([completion.token_ids for completion in completions]))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
