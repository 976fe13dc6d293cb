"""An expert-parallel replica over two real Ray nodes that share nothing but a slow link."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers

from bench.netrig.rig import Link, NetRig, why_not
from tests.support.ray_nodes import RayNodes

pytestmark = [
    pytest.mark.ray,
    pytest.mark.skipif(bool(why_not()), reason=f"cannot emulate nodes: {why_not()}"),
]

MODEL = Path(__file__).parents[2] / "examples" / "models" / "demo-moe"
PENSTOCK = str(Path(sys.executable).with_name("penstock"))

PROMPT, NUM_TOKENS = "def ", 12
GATEWAY = "127.0.0.1:50051"
LINK = Link(delay_s=0.001, bytes_per_s=60e6)
CLUSTER = f"""
cluster: {{name: ray-nodes}}
models:
  - name: demo-moe
    path: {MODEL}
    dtype: float32
    parallel: {{dp: 2, tp: 1}}
    kv_cache: {{memory: 8MiB}}
    resources: {{threads_per_rank: 1}}
    limits: {{max_step_tokens: 128, step_timeout: 30s}}
"""


@pytest.fixture
def rig():
    with NetRig(2, LINK) as two_nodes:
        yield two_nodes


def expected() -> list[int]:
    """What one process with transformers says."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    model = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    prompt = tokenizer(PROMPT)["input_ids"]
    output = model.generate(
        torch.tensor([prompt]),
        do_sample=False,
        max_new_tokens=NUM_TOKENS,
        min_new_tokens=NUM_TOKENS,
    )
    return output[0, len(prompt) :].tolist()


class Head:
    """Commands on the head node, and what they print."""

    def __init__(self, nodes: RayNodes, folder: Path) -> None:
        self._nodes, self._folder = nodes, folder
        self._count = 0

    def penstock(self, *arguments: str) -> str:
        self._count += 1
        log = self._folder / f"command{self._count}.log"
        process = self._nodes.run_on_head(PENSTOCK, *arguments, log=log)
        assert process.wait(60) == 0, log.read_text()
        return log.read_text()

    def tokens(self) -> list[int]:
        """What the cluster answers to the prompt."""
        answer = self.penstock(
            "generate",
            PROMPT,
            f"--max-tokens={NUM_TOKENS}",
            "--temperature=0",
            "--ignore-eos",
            "--token-ids",
            f"--address={GATEWAY}",
        )
        return [int(token) for token in answer.split()]

    def up(self, file: Path) -> None:
        log = self._folder / "up.log"
        self.process = self._nodes.run_on_head(
            PENSTOCK, "up", str(file), "--address", self._nodes.address, log=log
        )
        deadline_s = time.monotonic() + 120
        while "ready in" not in log.read_text():
            assert self.process.poll() is None, log.read_text()
            assert time.monotonic() < deadline_s, log.read_text()
            time.sleep(0.2)


def test_tokens_over_two_ray_nodes_are_those_of_one_process(rig, tmp_path):
    file = tmp_path / "cluster.yaml"
    file.write_text(CLUSTER)
    # With one CPU a node takes one rank.
    nodes = RayNodes(rig, tmp_path, cpus=1)
    try:
        head = Head(nodes, tmp_path)
        head.up(file)
        status = json.loads(head.penstock("status", "--json", "--address", GATEWAY))
        workers = status["replicas"][0]["workers"]
        assert len({worker["node"] for worker in workers}) == 2
        before = rig.control.wire()
        answer = head.tokens()
        crossed = rig.control.wire() - before
        assert answer == expected()
        # Every step is sent across and answered, and each mixture layer exchanges rows.
        assert crossed.messages > 2 * NUM_TOKENS
        assert crossed.num_bytes > NUM_TOKENS * 256
    finally:
        nodes.close()
