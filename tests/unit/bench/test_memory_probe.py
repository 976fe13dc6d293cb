"""The read probe gives a rate and its memory back, compiled or not."""

import bench.memory_probe as probes
from bench.memory_probe import MemoryProbe
from replicas.kernels.build import KernelsUnavailableError


def test_compiled_and_torch_probes_read(monkeypatch):
    compiled = MemoryProbe(2**24, 2)
    assert compiled.read() > 0.1
    compiled.close()
    compiled.close()

    def none():
        raise KernelsUnavailableError("there is no compiler")

    monkeypatch.setattr(probes, "find_compiler", none)
    plain = MemoryProbe(2**24, 2)
    assert plain.how == "torch.sum"
    assert plain.read() > 0.1
