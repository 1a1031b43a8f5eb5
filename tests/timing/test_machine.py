import json

import jax
import pytest

from mole_jax.timing import machine


@pytest.mark.parametrize(
  ("kind", "peak"),
  [
    ("NVIDIA H100 80GB HBM3", 989.4e12),
    ("NVIDIA H100 PCIe", 756e12),
    ("NVIDIA H200", 989.4e12),
    ("NVIDIA A100-SXM4-80GB", 312e12),
    ("TPU v4", 275e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5p", 459e12),
    ("TPU v6 lite", 918e12),
    ("cpu", None),
  ],
)
def test_peaks_are_found_by_what_jax_calls_a_device(kind, peak):
  assert machine.peak_flops(kind, "bfloat16") == peak
  assert machine.peak_flops(kind, "float32") is None


def test_a_machine_describes_itself_in_json():
  found = json.loads(json.dumps(machine.describe()))
  assert found["platform"] == "cpu"
  assert found["num_devices"] == len(jax.devices())
  assert found["memory_gib"] > 0
  versions = machine.versions(("jax", "no-such-package"))
  assert versions["jax"] == jax.__version__
  assert versions["no-such-package"] is None


def test_memory_of_a_cpu_is_that_of_the_process():
  block = bytearray(2**24)
  found = machine.peak_memory(jax.local_devices())
  assert found["of"] == "process"
  assert found["peak_gib"] * 2**30 > len(block)


def test_more_cores_than_there_are_cannot_be_used():
  with pytest.raises(ValueError, match="must lie between 1 and"):
    machine.use_cores(machine.num_cores() + 1)
