"""Pictures: nothing cut off, nothing overlapping, right numbers drawn."""

import matplotlib.text
import numpy as np
import pytest

from mole_jax.reporting import (
  expert_curves,
  expert_figures,
  figures,
  patch_figures,
  runs,
  samples,
)
from tests.reporting.run_directories import write_moe_run, write_run


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
  assert_readable(expert_figures.expert_load(run.routing))
  assert_readable(expert_figures.modality_share(run.routing))
  assert_readable(expert_curves.routing_curves(run))
  assert_readable(samples.overlay_figure(run, 0))


# The layers of the paper's Phi-2, and layers that differ.
@pytest.mark.parametrize(
  "experts", [dict.fromkeys(range(0, 32, 2), 4), {0: 4, 3: 2, 5: 8, 11: 6}]
)
def test_pictures_of_full_ffn_experts_are_readable(tmp_path, experts):
  run = runs.read_run(write_moe_run(tmp_path / "run", experts, 32))
  assert_readable(expert_figures.expert_load(run.routing))
  assert_readable(expert_figures.modality_share(run.routing))
  assert_readable(expert_figures.pathways(run.routing))
  assert_readable(expert_curves.routing_curves(run))


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
    patch_figures.patch_maps(image, [[0, 1, 0]], (2, 2), (0,), (0,))


def test_patch_maps_put_row_major_experts_in_their_place():
  image = np.zeros((8, 12, 3), np.uint8)
  figure = patch_figures.patch_maps(
    image, [[0, 1, 2, 3, 4, 5]], (2, 3), (0,), (6,)
  )
  assert figure.axes[1].get_title() == "layer 6"
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


def test_a_run_without_routing_in_its_log_is_refused(tmp_path):
  write_run(tmp_path / "run")
  (tmp_path / "run" / "mole" / "metrics.jsonl").unlink()
  run = runs.read_run(tmp_path / "run")
  with pytest.raises(ValueError, match="expert_load"):
    expert_curves.routing_curves(run)


def known_routing():
  """Images: expert 0 then 1. Text: 2 then 3, once 3 then 2. Layers 4 and 6."""
  return {
    "num_layers": 2,
    "layers": [4, 6],
    "num_experts": 4,
    "experts": [4, 4],
    "counts": {
      "a": {
        "image": [[8, 0, 0, 0], [0, 8, 0, 0]],
        "text": [[0, 0, 5, 1], [0, 0, 1, 5]],
      }
    },
    "pathways": {
      "image": {"num_tokens": 8, "num_distinct": 1, "commonest": [[[0, 1], 8]]},
      "text": {
        "num_tokens": 6,
        "num_distinct": 2,
        "commonest": [[[2, 3], 5], [[3, 2], 1]],
      },
    },
  }


def layer_labels(ax):
  return [label.get_text() for label in ax.get_xticklabels()]


def test_loads_are_drawn_at_their_layers_with_an_even_load():
  figure = expert_figures.expert_load(known_routing())
  wanted = [[8, 0], [0, 8], [5, 1], [1, 5]]
  for ax, counts in zip(figure.axes, wanted, strict=True):
    drawn = [p for p in ax.patches if hasattr(p, "get_height")]
    heights = [bar.get_height() for bar in drawn]
    np.testing.assert_allclose(heights, 100 * np.array(counts) / 14)
    levels = [p for p in ax.patches if not hasattr(p, "get_height")]
    np.testing.assert_array_equal(levels[0].get_data().values, [25, 25])
    assert layer_labels(ax) == ["4", "6"]


def test_modalities_of_each_expert_are_drawn_and_idle_experts_marked():
  figure = expert_figures.modality_share(known_routing())
  first, second, third, _ = figure.axes
  bars = lambda ax: [p for p in ax.patches if hasattr(p, "get_height")]
  heights = lambda ax: [bar.get_height() for bar in bars(ax)]
  assert heights(first) == [100, 0, 0, 0]  # Image by layer, text by layer.
  assert heights(second) == [0, 100, 0, 0]
  assert heights(third) == [0, 0, 100, 100]
  crosses = lambda ax: [list(line.get_xdata()) for line in ax.lines]
  assert (crosses(first), crosses(second), crosses(third)) == ([[1]], [[0]], [])


def test_pathways_are_rows_with_their_share_and_the_total():
  figure = expert_figures.pathways(known_routing())
  image, image_shares, text, text_shares = figure.axes
  cells = lambda ax: [t.get_text() for t in ax.texts]
  assert cells(image) == ["0", "1"]
  assert cells(text) == ["2", "3", "3", "2"]  # Row by row.
  assert cells(image_shares) == [" 100.0%"]
  assert cells(text_shares) == [" 83.3%", " 16.7%"]
  assert layer_labels(text) == ["4", "6"]
  titles = [part.get_suptitle() for part in figure.subfigs]
  assert titles == [
    "image tokens: 100.0% of 8 in 1 of 1 pathways",
    "text tokens: 100.0% of 6 in 2 of 2 pathways",
  ]


def test_a_modality_without_tokens_is_left_out_of_pathways_and_named():
  routing = known_routing()
  nothing = {"num_tokens": 0, "num_distinct": 0, "commonest": []}
  routing["pathways"]["image"] = nothing
  figure = expert_figures.pathways(routing)
  assert_readable(figure)
  assert len(figure.subfigs) == 1
  assert figure.legends[0].get_title().get_text() == "no image tokens"


def test_curves_name_layers_as_the_evaluation_does_and_show_what_is_dropped(
  tmp_path,
):
  experts = {0: 4, 6: 2}
  run = runs.read_run(write_moe_run(tmp_path / "run", experts, 8))
  figure = expert_curves.routing_curves(run)
  titles = [ax.get_title(loc="left") for ax in figure.axes]
  assert titles == [
    *("layer 0", "layer 6", "Router entropy (nats)"),
    "Choices dropped for lack of capacity (%)",
  ]
  # A line each expert that the layer has, and the even load.
  assert [len(ax.lines) for ax in figure.axes[:2]] == [5, 3]
  assert set(figure.axes[1].lines[-1].get_ydata()) == {50.0}
  most = figure.axes[3].lines[-1].get_ydata()
  dropped = run.stages[-1].series("dropped_share")
  np.testing.assert_allclose(most, 100 * dropped.max(axis=1))
  young = write_moe_run(tmp_path / "young", experts, 8)
  (young / "evaluation" / "routing.json").unlink()
  figure = expert_curves.routing_curves(runs.read_run(young))
  assert figure.axes[1].get_title(loc="left") == "layer 1"


def test_four_stages_are_named_with_the_steps_at_which_they_end(tmp_path):
  made = runs.read_runs(
    [
      write_moe_run(tmp_path / "moe", {0: 4, 2: 4}, 4),
      write_run(tmp_path / "mole"),
    ]
  )
  legend = figures.training_curves(made).legends[0]
  assert legend.get_title().get_text().splitlines() == [
    "stages of moe_llava: base to 600, projector to 620, tuning to 770, "
    "experts to 1,070",
    "stages of mole3: base to 600, mole to 900",
  ]
