"""Pictures: nothing cut off, nothing overlapping, right numbers drawn."""

import matplotlib.text
import numpy as np
import pytest

from mole_jax.reporting import expert_figures, figures, runs
from tests.reporting.run_directories import write_run


def drawn_ticks(axis):
  """Labels of ticks in view: matplotlib keeps some beyond it, undrawn."""
  low, high = sorted(axis.get_view_interval())
  return [
    tick.label1
    for tick in axis.get_major_ticks()
    if tick.label1.get_visible()
    and tick.label1.get_text()
    and low <= tick.get_loc() <= high
  ]


def assert_readable(figure):
  """Every text lies inside the canvas; ticks and panels do not collide."""
  figure.draw_without_rendering()
  renderer = figure.canvas.get_renderer()
  undrawn = set()
  for ax in figure.axes:
    drawn = drawn_ticks(ax.xaxis) + drawn_ticks(ax.yaxis)
    every = [*ax.xaxis.get_ticklabels(which="both")]
    every += ax.yaxis.get_ticklabels(which="both")
    undrawn |= set(every) - set(drawn)
    boxes = [text.get_window_extent(renderer) for text in drawn_ticks(ax.xaxis)]
    for left, right in zip(boxes, boxes[1:], strict=False):
      assert left.x1 <= right.x0, "two tick labels overlap"
  for text in figure.findobj(matplotlib.text.Text):
    if not text.get_visible() or not text.get_text() or text in undrawn:
      continue
    box = text.get_window_extent(renderer)
    assert box.x0 >= -1 and box.x1 <= figure.bbox.width + 1, text.get_text()
    assert box.y0 >= -1 and box.y1 <= figure.bbox.height + 1, text.get_text()
  panels = [ax.get_tightbbox(renderer) for ax in figure.axes]
  legends = [
    legend.get_window_extent(renderer)
    for part in (figure, *figure.subfigs)
    for legend in part.legends
  ]
  boxes = panels + legends
  for i, one in enumerate(boxes):
    for other in boxes[i + 1 :]:
      across = min(one.x1, other.x1) - max(one.x0, other.x0)
      down = min(one.y1, other.y1) - max(one.y0, other.y0)
      assert across <= 1 or down <= 1, "two panels or legends overlap"


@pytest.mark.parametrize("num_layers", [4, 32])
@pytest.mark.parametrize("num_experts", [1, 3, 8])
def test_expert_pictures_are_readable(tmp_path, num_experts, num_layers):
  patches = (24, 24) if num_layers == 32 else (6, 6)
  directory = write_run(
    tmp_path / "run",
    num_experts=num_experts,
    num_layers=num_layers,
    patches=patches,
  )
  run = runs.read_run(directory)
  assert_readable(expert_figures.expert_activation(run.routing))
  assert_readable(expert_figures.expert_activation(run.routing, True))
  assert_readable(expert_figures.routing_curves(run))
  sample = run.samples[0]
  layers = expert_figures.choose_layers(num_layers)
  image = np.zeros((48, 48, 3), np.uint8)
  assert_readable(
    expert_figures.patch_maps(image, sample["image_experts"], patches, layers)
  )


@pytest.mark.parametrize("count", [1, 2, 8])
def test_curves_and_bars_of_several_runs_are_readable(tmp_path, count):
  names = [f"a_long_name_of_a_config_{i}" for i in range(count)]
  made = runs.read_runs([write_run(tmp_path / n, n) for n in names])
  assert_readable(figures.training_curves(made))
  assert_readable(figures.domain_curves(made))
  assert_readable(figures.accuracy_bars(made))


def test_seeds_share_a_bar_with_a_whisker_and_a_dot_each(tmp_path):
  made = runs.read_runs(
    [write_run(tmp_path / str(seed), seed=seed) for seed in (0, 1, 2)]
  )
  ax = figures.accuracy_bars(made).axes[0]
  heights = [bar.get_height() for bar in ax.patches]
  general = [run.evaluation["domains"]["general"]["accuracy"] for run in made]
  assert len(heights) == 4  # Three domains and the average.
  assert heights[0] == pytest.approx(100 * sum(general) / 3)
  dots = [line for line in ax.lines if line.get_marker() == "o"]
  assert sorted(dots[0].get_ydata()) == pytest.approx(
    sorted(100 * value for value in general)
  )


def test_stages_stand_end_to_end_with_a_line_between(tmp_path):
  (run,) = runs.read_runs([write_run(tmp_path / "run")])
  ax = figures.training_curves([run]).axes[0]
  first_steps = {float(line.get_xdata()[0]) for line in ax.lines}
  assert {10.0, 610.0, 600.0} == first_steps  # Curves, then the boundary.


def test_expert_shares_are_counts_over_their_sum():
  routing = {
    "num_layers": 2,
    "num_experts": 2,
    "counts": {"d": {"image": [[3, 1], [0, 0]], "text": [[1, 3], [2, 6]]}},
  }
  np.testing.assert_allclose(
    expert_figures.expert_shares(routing, "d"), [[0.5, 0.5], [0.25, 0.75]]
  )
  image = expert_figures.expert_shares(routing, "d", "image")
  np.testing.assert_allclose(image, [[0.75, 0.25], [np.nan, np.nan]])


def test_a_domain_without_image_tokens_says_so():
  routing = {
    "num_layers": 2,
    "num_experts": 2,
    "counts": {"d": {"image": [[0, 0], [0, 0]], "text": [[1, 3], [2, 6]]}},
  }
  figure = expert_figures.expert_activation(routing, by_modality=True)
  texts = [text.get_text() for text in figure.axes[0].texts]
  assert texts == ["no such tokens"]


def test_patches_that_do_not_fill_the_grid_are_refused():
  image = np.zeros((8, 8, 3), np.uint8)
  with pytest.raises(ValueError, match=r"has 3 patches.*wants 4"):
    expert_figures.patch_maps(image, [[0, 1, 0]], (2, 2), (0,))


def test_patch_maps_put_row_major_experts_in_their_place():
  image = np.zeros((8, 12, 3), np.uint8)
  figure = expert_figures.patch_maps(image, [[0, 1, 2, 3, 4, 5]], (2, 3), (0,))
  placed = {
    (text.get_position()[0], text.get_position()[1]): text.get_text()
    for text in figure.axes[1].texts
  }
  assert placed[(1.5, 1.5)] == "0"
  assert placed[(9.5, 1.5)] == "2"
  assert placed[(1.5, 5.5)] == "3"


def test_smoothing_keeps_a_line_and_skips_gaps():
  line = np.full(40, 2.5)
  line[[3, 17]] = np.nan
  smoothed = figures.smooth(line)
  np.testing.assert_allclose(smoothed[~np.isnan(line)], 2.5)
  assert np.isnan(smoothed[[3, 17]]).all()
  noisy = np.random.default_rng(0).normal(size=400)
  assert figures.smooth(noisy).std() < 0.5 * noisy.std()
  assert len(figures.smooth(np.ones(1))) == 1


def test_layers_are_spread_with_both_ends():
  assert expert_figures.choose_layers(4) == (0, 1, 2, 3)
  assert expert_figures.choose_layers(1) == (0,)
  assert expert_figures.choose_layers(32) == (0, 10, 21, 31)


def test_a_run_without_routing_in_its_log_is_refused(tmp_path):
  write_run(tmp_path / "run")
  (tmp_path / "run" / "mole" / "metrics.jsonl").unlink()
  run = runs.read_run(tmp_path / "run")
  with pytest.raises(ValueError, match="expert_load"):
    expert_figures.routing_curves(run)
