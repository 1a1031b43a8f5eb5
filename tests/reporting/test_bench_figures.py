"""Pictures of what bench wrote, from made results."""

import json

import pytest

from mole_jax.reporting import bench_figures

ABOUT = {
  "machine": {"device_kind": "cpu", "cpu": "some cpu", "num_cores": 2},
  "versions": {"jax": "1.2.3"},
  "commit": "0123456789-dirty",
}
SIDES = {
  name: {"step_seconds": {"median": cost}, "memory": {"peak_gib": 2 * cost}}
  for name, cost in (("mole_jax", 0.5), ("peft", 0.75))
}
ROWS = [
  {"num_experts": count, "strategy": name, "over_lora": {"median": ratio}}
  for count, name, ratio in (
    (0, "base", 0.8),
    (1, "lora", 1.0),
    (2, "masked", 1.1),
    (2, "sorted", 1.4),
    (8, "masked", 1.5),
    (8, "sorted", 1.2),
  )
]
RECORDS = {
  "points": [
    {
      "size": size,
      "count_seconds": size / 1000,
      "first_batch_seconds": 0.1,
      "peak_gib": 0.25,
    }
    for size in (1000, 1_000_000)
  ],
  "powers": {"count_seconds": 1.0, "first_batch_seconds": 0.0, "peak_gib": 0.0},
}


def write(path, command, **found):
  path.parent.mkdir(exist_ok=True)
  path.write_text(json.dumps({**ABOUT, "command": command, **found}))
  return path


def test_strategies_are_lines_over_numbers_of_experts():
  (ax,) = bench_figures.dispatch_bars({"rows": ROWS}).axes
  lines = {line.get_label(): line for line in ax.lines}
  assert set(lines) == {"masked", "sorted", "plain LoRA"}
  assert list(lines["sorted"].get_xdata()) == [2, 8]
  assert list(lines["sorted"].get_ydata()) == [1.4, 1.2]


def test_sides_are_bars_of_seconds_and_memory():
  seconds, memory = bench_figures.side_bars({"sides": SIDES}).axes
  assert [bar.get_height() for bar in seconds.patches] == [0.5, 0.75]
  assert [bar.get_height() for bar in memory.patches] == [1.0, 1.5]
  names = [label.get_text() for label in seconds.get_xticklabels()]
  assert names == ["mole_jax", "peft"]


def test_records_have_costs_of_their_own_and_linear_beside():
  figure = bench_figures.cost_curves({"curves": {"records": RECORDS}})
  first, _, _ = figure.axes
  assert first.get_title(loc="left") == "opening, first time (s), power 1.00"
  measured, linear = first.lines
  assert list(measured.get_ydata()) == list(linear.get_ydata()) == [1, 1000]
  names = [label.get_text() for label in first.get_xticklabels()]
  assert names == ["1,000", "1,000,000"]


def test_each_file_becomes_a_picture_of_its_name(tmp_path):
  files = [
    write(tmp_path / "a.json", "dispatch", rows=ROWS),
    write(tmp_path / "b.json", "compare", sides=SIDES, config="c", variant="d"),
  ]
  made = bench_figures.draw(files, tmp_path / "out")
  assert made == [tmp_path / "out" / name for name in ("a.png", "b.png")]
  assert all(path.stat().st_size > 5_000 for path in made)


def test_what_is_not_whole_or_would_be_lost_is_refused(tmp_path):
  cut = write(tmp_path / "cut.json", "curves")
  with pytest.raises(ValueError, match=r"cut.json is of `bench curves`, but"):
    bench_figures.draw([cut], tmp_path)
  twice = [
    write(tmp_path / folder / "a.json", "compare", sides=SIDES)
    for folder in ("one", "two")
  ]
  with pytest.raises(ValueError, match="two/a.json would be drawn over"):
    bench_figures.draw(twice, tmp_path)
