"""Peers as processes, their output as numbers, their installation as steps."""

import json
import sys

import pytest

import bench.peers.install as installer
from bench.peers.llama_cpp import batched_times
from bench.peers.places import place_of
from bench.peers.processes import HostedBatches, child, free_port, http_server, session_pids
from bench.peers.protocol import Batch, PeerError
from bench.peers.transformers import Transformers
from bench.peers.vllm import Vllm

BATCH = Batch(size=2, prompt_tokens=8, new_tokens=5, seed=1)
HOST = """
import json, sys
print(json.dumps({"ready": "fake 1.0"}), flush=True)
for line in sys.stdin:
    if json.loads(line)["batch"] == 3:
        sys.exit("out of memory")
    print(json.dumps({"prefill_s": 2.0, "decode_s": 4.0, "decode_tokens": 8}), flush=True)
"""
SERVER = """
import http.server, subprocess, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def test_a_host_answers_batches_and_its_last_words_are_the_reason(tmp_path):
    log = tmp_path / "log"
    with child([sys.executable, "-c", HOST], log, {}, piped=True) as process:
        host = HostedBatches(process, log)
        assert host.version == "fake 1.0"
        times = host.run(BATCH)
        assert times.prefill_rate(BATCH) == 8.0
        assert times.decode_rate == 2.0
        with pytest.raises(PeerError, match="out of memory"):
            host.run(Batch(size=3, prompt_tokens=8, new_tokens=5, seed=1))


def test_a_server_is_ended_with_all_that_it_started(tmp_path):
    port = free_port()
    command = [sys.executable, "-c", SERVER, str(port)]
    with http_server(command, tmp_path / "log", {}, port=port, model="m") as server:
        assert server.target == f"127.0.0.1:{port}"
        [leader] = list(session_pids_of(port))
        assert len(session_pids(leader)) == 2
    assert session_pids(leader) == []


def session_pids_of(port):
    import psutil

    for process in psutil.process_iter(["pid", "cmdline"]):
        cmdline = process.info["cmdline"] or []
        if cmdline[-1:] == [str(port)] and SERVER in cmdline:
            yield process.pid


def test_a_server_that_does_not_start_says_why(tmp_path):
    command = [sys.executable, "-c", "import sys; sys.exit('no such flag')"]
    with (
        pytest.raises(PeerError, match="no such flag"),
        http_server(command, tmp_path / "log", {}, port=free_port(), model="m"),
    ):
        pass


def test_batched_bench_counts_every_token_as_decoded():
    row = {"pp": 8, "tg": 5, "pl": 2, "t_pp": 0.5, "t_tg": 2.0}
    times = batched_times(f"noise\n{json.dumps(row)}\n\n", BATCH)
    assert (times.prefill_s, times.decode_rate) == (0.5, 5.0)
    with pytest.raises(PeerError, match="no result: cannot load"):
        batched_times("cannot load", BATCH)


def test_who_is_not_installed_says_how_to_mend_it(tmp_path):
    reason = Vllm(tmp_path).why_not(online=False)
    assert reason == "not installed (python -m bench.peers install vllm)"
    assert "ignore_eos" in Transformers(2, tmp_path).why_not(online=True)


def test_installing_twice_does_nothing_and_a_failed_step_leaves_no_stamp(tmp_path, monkeypatch):
    calls = []

    def steps(place):
        calls.append(place.root)
        code = "import sys; sys.exit('disk full' if len(sys.argv) > 1 else 0)"
        extra = [] if len(calls) > 1 else ["fail"]
        installer._run(place, "step", [sys.executable, "-c", code, *extra])

    monkeypatch.setattr(installer, "_INSTALLERS", {"vllm": ("vllm 1", steps)})
    with pytest.raises(installer.InstallError, match="disk full"):
        installer.install("vllm", tmp_path)
    assert place_of("vllm", tmp_path).installed() == ""
    for _ in range(2):
        assert installer.install("vllm", tmp_path) == "vllm 1"
    assert len(calls) == 2
    assert place_of("vllm", tmp_path).installed() == "vllm 1"
