"""Cost against work: what a point runs, and how growth is told."""

import json

import pytest

from mole_jax import bench, report
from mole_jax.data import schedule
from mole_jax.timing import curves, opening, protocol
from tests.training import small_run

# ml_collections loads configuration files in a way that is going away.
pytestmark = pytest.mark.filterwarnings(
  "ignore:the load_module:DeprecationWarning"
)
TINY = [
  "--config=configs/mole3.py:small",
  "--config.model.decoder.hidden_size=32",
  "--config.model.decoder.intermediate_size=32",
  "--config.model.vision.num_layers=1",
  "--config.model.vision.hidden_size=64",
]


@pytest.fixture
def one_device(monkeypatch):
  """Processes that are started see no fake devices."""
  monkeypatch.setenv("XLA_FLAGS", "")


def points(costs):
  return [
    {"size": size, "step_seconds": {"median": cost}, "peak_gib": 1.0}
    for size, cost in costs.items()
  ]


def test_growth_is_the_power_of_the_size():
  assert curves.growth(points({2: 3.0, 8: 12.0}), "step_seconds") == 1
  assert curves.growth(points({2: 3.0, 8: 48.0}), "step_seconds") == 2
  assert curves.growth(points({2: 3.0, 8: 48.0}), "peak_gib") == 0
  assert curves.growth(points({2: 3.0}), "peak_gib") is None


def test_layers_grow_where_told_and_are_drawn(tmp_path, one_device):
  file = tmp_path / "curves.json"
  command = ["curves", *TINY, "--only", "layers", "--layers", "3", "1"]
  assert bench.main([*command, "--steps=1", f"--json={file}"]) == 0
  found = json.loads(file.read_text())
  assert found["command"] == "curves"
  one, three = found["curves"]["layers"]["points"]
  assert set(found["curves"]["layers"]["powers"]) == set(curves.COSTS)
  assert (one["size"], three["size"]) == (1, 3)
  assert one["flops"] < three["flops"] < 3 * one["flops"]
  assert min(three["compile_seconds"], three["peak_gib"]) > 0
  assert report.main([f"--bench={file}", f"--out={tmp_path}"]) == 0
  assert (tmp_path / "curves.png").stat().st_size > 10_000


def test_one_expert_is_plain_lora_and_has_a_point(tmp_path, one_device):
  file = tmp_path / "curves.json"
  command = ["curves", *TINY, "--config.model.decoder.num_layers=1"]
  command += ["--only", "experts", "--experts", "1", "2"]
  assert bench.main([*command, "--steps=1", f"--json={file}"]) == 0
  one, two = json.loads(file.read_text())["curves"]["experts"]["points"]
  assert (one["size"], two["size"]) == (1, 2)
  assert one["flops"] < two["flops"]  # A router.
  assert one["host_peak_gib"] > 0


def test_records_are_made_counted_and_opened_again(
  tmp_path, one_device, capsys
):
  file = tmp_path / "records.json"
  command = ["curves", *TINY, "--only", "records", "--records", "40", "20"]
  assert bench.main([*command, f"--json={file}"]) == 0
  curve = json.loads(file.read_text())["curves"]["records"]
  assert [point["size"] for point in curve["points"]] == [20, 40]
  assert set(curve["powers"]) == set(curves.RECORD_COSTS)
  for point in curve["points"]:
    assert point["first_batch_seconds"] > point["open_seconds"] > 0
    assert point["peak_gib"] > 0
  table = capsys.readouterr().out
  assert "records: cost by size" in table
  assert "power" in table.splitlines()[-3]
  assert report.main([f"--bench={file}", f"--out={tmp_path}"]) == 0
  assert (tmp_path / "records.png").stat().st_size > 10_000


def test_a_made_set_is_opened_whole_and_its_counts_are_kept(tmp_path):
  config = small_run.make_config()
  config["stages"]["mole"]["max_length"] = 512
  opening.make_set(tmp_path, 30)
  assert opening.measure(config, "mole", tmp_path)["records"] == 30
  kept = list(tmp_path.rglob("lengths/*/about.json"))
  assert len(kept) == 1
  written = kept[0].stat().st_mtime_ns
  assert opening.measure(config, "mole", tmp_path)["plan_seconds"] > 0
  assert kept[0].stat().st_mtime_ns == written
  with pytest.raises(ValueError, match="there is no folder"):
    opening.measure(config, "mole", tmp_path / "elsewhere")


def test_planning_an_epoch_is_timed_from_its_first_row(tmp_path, monkeypatch):
  planned = []
  make = schedule.Packed._make

  def noted(self, number):
    planned.append(number)
    return make(self, number)

  monkeypatch.setattr(schedule.Packed, "_make", noted)
  config = small_run.make_config()
  config["stages"]["mole"]["max_length"] = 512
  opening.make_set(tmp_path, 30)
  opening.measure(config, "mole", tmp_path)
  assert planned.count(0) == 2  # For the first batch, and for the epoch.


def test_a_point_that_does_not_run_says_why(one_device):
  with pytest.raises(protocol.SideError, match="max_length=8 holds no 1 image"):
    curves.measure("tokens", [8], "mole", TINY, (), 1, print)


def test_a_file_without_a_picture_is_told(tmp_path, capsys):
  other = tmp_path / "step.json"
  other.write_text(json.dumps({"command": "step"}))
  assert report.main(["--bench", str(other)]) == 2
  assert "of `bench step`, which has no picture" in capsys.readouterr().err
  other.write_text("[]")
  assert report.main(["--bench", str(other)]) == 2
  assert "is not what `bench ... --json` writes" in capsys.readouterr().err
  with pytest.raises(SystemExit):
    report.main([])
