"""`penstock up` and its ends: nothing stays behind, and wrong input never starts anything."""

import os
import signal
import socket
import subprocess
import time

import pytest
import torch
import transformers

from tests.e2e.conftest import (
    CLUSTER,
    MIXTURE,
    MODEL,
    PENSTOCK,
    penstock,
    start_cluster,
    stop_cluster,
    write_cluster,
)

pytestmark = pytest.mark.e2e


def descendants(pid: int) -> set[int]:
    """Every process below `pid`, found through /proc."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/stat") as stat:
                    parent = int(stat.read().rpartition(")")[2].split()[1])
            except OSError:
                continue
            children.setdefault(parent, []).append(int(entry))
    found: set[int] = set()
    todo = [pid]
    while todo:
        for child in children.get(todo.pop(), []):
            found.add(child)
            todo.append(child)
    return found


def alive(pids: set[int]) -> set[int]:
    left = set()
    for pid in pids:
        try:
            with open(f"/proc/{pid}/stat") as stat:
                if stat.read().rpartition(")")[2].split()[0] != "Z":
                    left.add(pid)
        except OSError:
            continue
    return left


def answer_of_transformers(prompt: str, num_tokens: int) -> str:
    tokenizer = transformers.AutoTokenizer.from_pretrained(MIXTURE)
    model = transformers.AutoModelForCausalLM.from_pretrained(MIXTURE, dtype=torch.float32)
    inputs = tokenizer(prompt, return_tensors="pt")
    output = model.generate(**inputs, do_sample=False, max_new_tokens=num_tokens)
    text = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert isinstance(text, str)
    return text


def test_a_mixture_of_experts_answers_and_ctrl_c_leaves_nothing_running(tmp_path):
    one = CLUSTER.replace("replicas: 2", "replicas: 1")
    cluster = start_cluster(tmp_path, "ctrl-c", MIXTURE, one)
    answer = penstock("generate", "import os\n", "--temperature", "0", "--max-tokens", "24",
                      env=cluster.env)  # fmt: skip
    assert answer.returncode == 0, answer.stderr
    assert answer_of_transformers("import os\n", 24).strip() in answer.stdout
    processes = descendants(cluster.process.pid)
    assert len(processes) > 5
    assert stop_cluster(cluster) == 0
    deadline_s = time.monotonic() + 10.0
    while alive(processes) and time.monotonic() < deadline_s:
        time.sleep(0.1)
    assert alive(processes) == set()
    assert penstock("status", env=cluster.env).returncode == 2
    for address in (cluster.grpc, cluster.http.removeprefix("http://")):
        host, port = address.split(":")
        with socket.socket() as probe:
            assert probe.connect_ex((host, int(port))) != 0


def test_a_taken_port_is_refused_before_anything_starts(tmp_path):
    file = write_cluster(tmp_path, "taken")
    with socket.create_server(("127.0.0.1", file.http)):
        answer = penstock("up", str(file.path), env={"PENSTOCK_STATE_DIR": str(tmp_path)})
    assert answer.returncode == 2
    assert f"127.0.0.1:{file.http}" in answer.stderr
    assert "gateway.http_port" in answer.stderr
    assert "Traceback" not in answer.stderr


@pytest.mark.parametrize("flags", [(), ("--detach",)])
def test_a_damaged_checkpoint_is_reported_with_its_cause_and_nothing_stays(tmp_path, flags):
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in MODEL.iterdir():
        if file.is_file():
            (broken / file.name).write_bytes(file.read_bytes())
    weights = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(weights[:-1000])
    file = write_cluster(tmp_path, "broken", broken)
    env = {"PENSTOCK_STATE_DIR": str(tmp_path)}
    answer = penstock("up", str(file.path), *flags, env=env, timeout=120)
    assert answer.returncode == 2
    said = answer.stdout if flags else answer.stderr
    assert "model.safetensors" in said
    assert "Traceback" not in said


def test_interrupting_while_starting_leaves_nothing(tmp_path):
    file = write_cluster(tmp_path, "hasty")
    process = subprocess.Popen(
        [PENSTOCK, "up", str(file.path)],
        env={**os.environ, "PENSTOCK_STATE_DIR": str(tmp_path)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    time.sleep(6.0)
    processes = descendants(process.pid)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=90)
    assert process.returncode != 0
    assert "Traceback" not in errors
    deadline_s = time.monotonic() + 10.0
    while alive(processes) and time.monotonic() < deadline_s:
        time.sleep(0.1)
    assert alive(processes) == set()
