"""`bench` as a user types it: JSON, messages, exit codes."""

import json
import signal
import subprocess
import sys
import time

import pytest

from mole_jax import bench
from tests import test_main

# ml_collections loads configuration files in a way that is going away.
pytestmark = pytest.mark.filterwarnings(
  "ignore:the load_module:DeprecationWarning"
)
CONFIG = "--config=configs/mole3.py"
TINY = [
  CONFIG,
  "--config.model.vision.num_layers=1",
  "--config.model.decoder.num_layers=1",
  "--config.model.vision.hidden_size=32",
  "--config.model.decoder.hidden_size=32",
  "--config.stages.mole.batch_size=8",
]


def run(folder, *args):
  path = folder / "found.json"
  assert bench.main([*args, "--json", str(path)]) == 0
  return json.loads(path.read_text())


def test_step_on_made_and_on_real_data(tmp_path):
  # In a process of its own, which has one device.
  path = tmp_path / "found.json"
  args = ["--steps=2", "--skip-warm", "--first-step", "--json", str(path)]
  args += TINY
  done = test_main.call([sys.executable, "-m", "mole_jax.bench", "step", *args])
  assert done.returncode == 0, done.stdout + done.stderr
  assert "MFU unknown" in done.stdout
  found = json.loads(path.read_text())
  for key in ("machine", "versions", "commit", "arguments", "time"):
    assert key in found
  assert (found["config"], found["stage"]) == ("mole3", "mole")
  assert found["step"]["batch_size"] == 8
  assert set(found["compile_seconds"]) == {"cold"}
  assert set(found["first_step_seconds"]) == {"cold"}
  flops = found["step"]["flops"]["total"]
  for data in ("synthetic", "real"):
    timing = found[data]
    seconds = timing["step_seconds"]["median"]
    achieved = timing["tflops_per_second_per_device"] * 1e12
    devices = found["machine"]["num_devices"]
    assert achieved * devices * seconds == pytest.approx(flops)
    assert timing["tokens_per_second"] * seconds == pytest.approx(8 * 272)
    assert 0 <= timing["stall_share"] < 1
  made, real = found["synthetic"], found["real"]
  assert made["text_tokens_per_second"] == made["tokens_per_second"]
  assert real["text_tokens_per_second"] < real["tokens_per_second"]


def test_dispatch_needs_no_config(tmp_path):
  sizes = ["--hidden", "16", "--intermediate", "24", "--tokens", "32"]
  args = ["--experts", "2", "--strategies", "masked", "--rounds", "1"]
  found = run(tmp_path, "dispatch", *sizes, *args)
  assert [row["strategy"] for row in found["rows"]] == [
    "base",
    "lora",
    "masked",
  ]


def test_decode_tells_prefill_from_a_token(tmp_path):
  args = ["--batch-size=2", "--prompt-tokens=48", "--new-tokens=3"]
  found = run(tmp_path, "decode", "--rounds=2", *args, *TINY)
  assert found["prefill_seconds"]["count"] == 2
  # Which case comes depends on the machine; test_beside has both for sure.
  median = found["seconds_a_token"]["median"]
  expected = pytest.approx(2 / median) if median > 0 else None
  assert found["new_tokens_per_second"] == expected


def test_data_counts_what_comes(tmp_path):
  found = run(tmp_path, "data", "--batches=4", *TINY)
  rates = [found[f"{k}_per_second"] for k in ("rows", "samples", "tokens")]
  assert rates == sorted(rates) and rates[0] > 0
  assert found["tokens_per_second"] <= found["rows_per_second"] * 272


def test_told_to_end_it_leaves_nothing_behind(tmp_path):
  args = ["curves", "--only=experts", "--experts=2", *TINY]
  process = subprocess.Popen(
    [sys.executable, "-m", "mole_jax.bench", *args],
    cwd=test_main.ROOT,
    env=test_main.environment() | {"TMPDIR": str(tmp_path)},
    stdout=subprocess.DEVNULL,
  )
  try:
    while not list(tmp_path.glob("mole_jax-curves-*")):
      assert process.poll() is None
      time.sleep(0.05)
    process.terminate()
    assert process.wait(timeout=60) == 128 + signal.SIGTERM
  finally:
    process.kill()
  assert not list(tmp_path.glob("mole_jax-*"))


@pytest.mark.parametrize(
  ("args", "message"),
  [
    (["step"], "--config=FILE"),
    (
      ["step", CONFIG, "--stage=nose"],
      "none of the config's: ['base', 'mole']",
    ),
    (["step", CONFIG, "--config.stages.mole.max_length=60"], "max_length to"),
    (["decode", CONFIG, "--prompt-tokens=20"], "use 40 or more"),
    (["compare", CONFIG, "--stage=base"], "trains no adapters"),
  ],
)
def test_wrong_usage_is_told_in_a_line(args, message, capsys):
  assert bench.main(args) == 2
  printed = capsys.readouterr().err
  assert message in printed
  assert len(printed.strip().splitlines()) == 1
