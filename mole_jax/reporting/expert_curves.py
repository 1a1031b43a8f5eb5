"""What routers do over the steps of training."""

from collections.abc import Sequence

import matplotlib.figure
import matplotlib.ticker
import numpy as np

from mole_jax.reporting import figures, palette, routing
from mole_jax.reporting import runs as runs_lib


def routing_curves(run: runs_lib.Run) -> matplotlib.figure.Figure:
  """Expert load (a panel a layer), router entropy, dropped share over steps.

  Of the last stage that routed; four layers at most. Dropped shares are there
  where they were logged. ValueError where no stage has logged an expert load.
  """
  stages = [stage for stage in run.stages if stage.has("expert_load")]
  if not stages:
    raise ValueError(
      f"run {run.directory} has logged no expert_load; a stage that trains "
      "experts writes it."
    )
  stage = stages[-1]
  load = stage.series("expert_load")
  num_layers = load.shape[1]
  numbers = run.layer_numbers(num_layers)
  experts = run.experts_of(num_layers) or [load.shape[2]] * num_layers
  shown = routing.choose_layers(num_layers)
  has_drops = stage.has("dropped_share")

  heights = (1.15, 1, 1) if has_drops else (1.15, 1)
  figure = figures.new_figure(9.5, 2.5 * len(heights) + 0.2)
  parts = figure.subfigures(len(heights), 1, height_ratios=heights)
  _load_panels(parts[0], stage.steps, load, shown, numbers, experts)

  ax = parts[1].subplots()
  figures.tidy(ax, "Router entropy (nats)")
  _layer_lines(ax, stage, stage.series("router_entropy"), shown, numbers)
  counts = sorted({experts[layer] for layer in shown} - {1})
  for number, count in enumerate(counts):
    listed = ", ".join(map(str, counts))
    ax.axhline(
      np.log(count),
      color="0.4",
      linestyle=":",
      linewidth=1,
      # One entry: the lines look alike, and lie in this order upwards.
      label=None if number else f"uniform over {listed} experts",
    )
  ax.set_ylim(bottom=0, top=max(0.1, 1.08 * np.log(max(experts))))
  figures.add_legend(parts[1], *ax.get_legend_handles_labels(), 9.5)

  if has_drops:
    ax = parts[2].subplots()
    figures.tidy(ax, "Choices dropped for lack of capacity (%)")
    dropped = 100 * stage.series("dropped_share")
    _layer_lines(ax, stage, dropped, shown, numbers)
    ax.plot(
      stage.steps,
      dropped.max(axis=1),
      color="black",
      linewidth=1,
      label=f"most of all {num_layers} layers",
    )
    ax.set_ylim(bottom=0, top=max(1.0, 1.1 * np.nanmax(dropped)))
    figures.add_legend(parts[2], *ax.get_legend_handles_labels(), 9.5)
  return figure


def _load_panels(
  figure,
  steps: np.ndarray,
  load: np.ndarray,
  shown: Sequence[int],
  numbers: Sequence[int],
  experts: Sequence[int],
) -> None:
  """A panel for each layer shown, a line for each expert that it has."""
  axes = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
  for ax, layer in zip(axes, shown, strict=True):
    for expert in range(experts[layer]):
      ax.plot(
        steps,
        100 * load[:, layer, expert],
        **_line(expert, len(steps), 5, palette.EXPERT_COLOURS),
        label=f"expert {expert}",
      )
    ax.axhline(100 / experts[layer], color="0.4", linestyle=":", linewidth=1)
    figures.tidy(ax, f"layer {numbers[layer]}")
    ax.set_xlim(left=0)
    ax.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(4, integer=True))
  axes[0].set_ylim(bottom=-1)
  axes[0].set_ylabel("share of choices (%)", fontsize=9)
  fullest = max(axes, key=lambda ax: len(ax.lines))
  figures.add_legend(figure, *fullest.get_legend_handles_labels(), 9.5)


def _layer_lines(
  ax, stage, values: np.ndarray, shown: Sequence[int], numbers: Sequence[int]
) -> None:
  """A line for each layer shown of float[rows, L]."""
  for place, layer in enumerate(shown):
    if values.ndim == 2:
      ax.plot(
        stage.steps,
        values[:, layer],
        **_line(place, len(values), 8, palette.LINE_COLOURS),
        label=f"layer {numbers[layer]}",
      )
  ax.set_xlim(left=0)
  ax.set_xlabel(f"step of stage {stage.name}", fontsize=9)
  ax.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(6, integer=True))


def _line(number: int, length: int, marks: int, colours: Sequence[str]):
  return dict(
    color=colours[number % len(colours)],
    linestyle=palette.LINE_STYLES[number % len(palette.LINE_STYLES)],
    marker=palette.MARKERS[number % len(palette.MARKERS)],
    # Lines' marks do not fall on each other, and one point has its mark.
    markevery=(min(number, length - 1), max(1, length // marks)),
    markersize=4.5,
    markeredgecolor="black",  # Yellow on white is seen by its marks.
    markeredgewidth=0.6,
    linewidth=1.5,
  )
