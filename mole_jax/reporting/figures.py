"""Curves and bars of runs: one function a picture, each returns a Figure.

No pyplot: a Figure of its own needs no display and no closing. The maps of
what experts do are in `expert_figures`.
"""

import math
import textwrap
from collections.abc import Sequence

import matplotlib.axes
import matplotlib.backends.backend_agg
import matplotlib.figure
import matplotlib.lines
import matplotlib.patches
import matplotlib.ticker
import numpy as np

from mole_jax.reporting import palette, tables
from mole_jax.reporting import runs as runs_lib

_FONT_POINTS = 9


def new_figure(width: float, height: float) -> matplotlib.figure.Figure:
  """A Figure of `width` x `height` inches that lays itself out."""
  figure = matplotlib.figure.Figure(
    figsize=(width, height), layout="constrained", dpi=130
  )
  matplotlib.backends.backend_agg.FigureCanvasAgg(figure)
  return figure


def add_legend(
  figure, handles, labels, width: float, note: str | None = None
) -> None:
  """A legend below the panels, in as many columns as fit `width` inches.

  `note` is text above its entries.
  """
  # About 0.07 inch a letter at 9 points, 0.6 for the key and the gap.
  sizes = [0.07 * len(label) + 0.6 for label in labels] or [1.0]
  columns = len(sizes)
  if sum(sizes) > width:
    rows = math.ceil(columns / max(1, int(width / max(sizes))))
    columns = math.ceil(columns / rows)  # Rows of about the same length.
  figure.legend(
    handles,
    labels,
    loc="outside lower center",
    ncols=columns,
    frameon=False,
    fontsize=_FONT_POINTS,
    title=note,
    title_fontsize=_FONT_POINTS,
  )


def swatch(expert: int) -> matplotlib.patches.Patch:
  """An expert's colour and hatch, for a legend."""
  colour = palette.expert_colour(expert)
  return matplotlib.patches.Patch(
    facecolor=colour,
    edgecolor=palette.ink_on(colour),
    hatch=palette.expert_hatch(expert),
    linewidth=0.5,
  )


def label_layers(
  ax: matplotlib.axes.Axes, numbers: Sequence[int], most: int
) -> None:
  """The x axis of 0, 1, ... as layers of these numbers; `most` labels."""
  step = math.ceil(len(numbers) / most)
  places = range(0, len(numbers), step)
  ax.set_xticks(places, [str(numbers[place]) for place in places])
  ax.set_xlim(-0.6, len(numbers) - 0.4)
  ax.set_xlabel("layer", fontsize=_FONT_POINTS)


def tidy(ax: matplotlib.axes.Axes, title: str = "") -> None:
  """Small labels, no box, a faint grid."""
  ax.set_title(title, fontsize=_FONT_POINTS + 1, loc="left")
  ax.tick_params(labelsize=_FONT_POINTS - 1)
  ax.spines[["top", "right"]].set_visible(False)
  ax.grid(axis="y", alpha=0.25)
  ax.set_axisbelow(True)


def smooth(values: np.ndarray) -> np.ndarray:
  """Centred running mean over about a tenth of the points; NaN is skipped.

  Fewer than 20 points stay as they are: two would become a flat line.
  """
  half = len(values) // 20
  known = ~np.isnan(values)
  kernel = np.ones(2 * half + 1)
  # "full" and a cut: "same" returns the kernel's length for short series.
  cut = slice(half, half + len(values))
  total = np.convolve(np.where(known, values, 0.0), kernel)[cut]
  count = np.convolve(known.astype(float), kernel)[cut]
  return np.divide(total, count, out=np.full(len(values), np.nan), where=known)


def training_curves(runs: Sequence[runs_lib.Run]) -> matplotlib.figure.Figure:
  """Loss and next-token accuracy over all stages; a colour a run's name."""
  figure = new_figure(9.0, 3.6)
  axes = figure.subplots(1, 2)
  # The loss without the balance term: runs with and without it compare.
  has_lm = all(stage.has("lm_loss") for run in runs for stage in run.stages)
  _curves(axes[0], runs, "lm_loss" if has_lm else "loss", None)
  _set_loss_scale(axes[0])
  tidy(axes[0], "Language loss (nats a token)" if has_lm else "Loss")
  _curves(axes[1], runs, "accuracy", None)
  tidy(axes[1], "Next-token accuracy")
  for ax in axes:
    _finish_steps(ax, runs)
  add_legend(figure, *_run_handles(runs), 9.0, _stage_note(runs, 9.0))
  return figure


def domain_curves(runs: Sequence[runs_lib.Run]) -> matplotlib.figure.Figure:
  """Loss (top) and next-token accuracy (bottom), a column a domain."""
  domains = all_domains(runs) or ("all",)
  width = max(6.0, 3.1 * len(domains))
  figure = new_figure(width, 5.2)
  axes = figure.subplots(
    2, len(domains), sharex=True, sharey="row", squeeze=False
  )
  for row, key in enumerate(("domain_loss", "domain_accuracy")):
    for ax, domain in zip(axes[row], domains, strict=True):
      _curves(ax, runs, key, domain)
      tidy(ax, f"{domain}: {'accuracy' if row else 'loss'}")
  _set_loss_scale(*axes[0])
  for ax in axes.flat:
    _finish_steps(ax, runs)
  for ax in axes[0]:
    ax.set_xlabel("")
  add_legend(figure, *_run_handles(runs), width, _stage_note(runs, width))
  return figure


def accuracy_bars(runs: Sequence[runs_lib.Run]) -> matplotlib.figure.Figure:
  """Test accuracy by domain: bars a name, dots its runs, levels drawn in.

  A short black line is the majority answer, a white diamond the same model
  with blank images. Runs without evaluation are left out.
  """
  groups = runs_lib.group_runs([run for run in runs if run.evaluation])
  one_each = [tables.domain_table(group.runs) for group in groups]
  columns = tables.domain_table(runs).columns
  width = max(7.0, 1.2 + 0.55 * len(columns) * (len(groups) + 1))
  figure = new_figure(width, 3.8)
  ax = figure.subplots()
  thick = 0.8 / max(1, len(groups))
  for number, (group, table) in enumerate(zip(groups, one_each, strict=True)):
    colour = palette.LINE_COLOURS[number % len(palette.LINE_COLOURS)]
    ink = palette.ink_on(colour)
    for column, name in enumerate(table.columns):
      cells = [cells[column] for _, cells in table.rows]
      singles = [
        cell
        for cell, is_mean in zip(cells, table.is_mean, strict=True)
        if not is_mean
      ]
      cell = cells[-1]
      if math.isnan(cell.accuracy):
        continue
      x = columns.index(name) + (number - (len(groups) - 1) / 2) * thick
      ax.bar(
        x,
        100 * cell.accuracy,
        0.92 * thick,
        color=colour,
        edgecolor=ink,
        linewidth=0,
        hatch=palette.expert_hatch(number),
        label=group.label if column == 0 else None,
      )
      if cell.spread is not None:
        ax.errorbar(x, 100 * cell.accuracy, 100 * cell.spread, c="k", capsize=4)
        ax.plot(
          [x + 0.2 * thick] * len(singles),
          [100 * single.accuracy for single in singles],
          "o",
          color="white",
          markeredgecolor="black",
          markersize=3.5,
        )
      top = max(
        100 * (cell.accuracy + (cell.spread or 0.0)),
        *(100 * s.accuracy for s in singles if not math.isnan(s.accuracy)),
        0.0,
      )
      ax.text(
        x,
        top + 1.5,
        tables.percent(cell.accuracy),
        ha="center",
        va="bottom",
        fontsize=_FONT_POINTS - 1,
      )
      ends = [x - 0.46 * thick, x + 0.46 * thick]
      # White under black: seen on every bar colour and on its hatch.
      for extra, shade in ((4.0, "white"), (1.8, "black")):
        ax.plot(
          ends,
          [100 * cell.majority] * 2,
          color=shade,
          linewidth=extra,
          solid_capstyle="butt",
          label="majority answer" if shade == "black" else None,
        )
      ax.plot(
        x - (0.2 * thick if cell.spread is not None else 0.0),
        100 * cell.blank,
        "D",
        color="white",
        markeredgecolor="black",
        markersize=6,
        label="same model, blank images",
      )
  ax.set_xticks(range(len(columns)), columns)
  ax.set_ylim(0, 112)
  ax.set_yticks(range(0, 101, 20))
  ax.set_ylabel("test questions right (%)", fontsize=_FONT_POINTS)
  tidy(ax)
  handles, labels = ax.get_legend_handles_labels()
  first = {label: labels.index(label) for label in labels}
  levels = ("majority answer", "same model, blank images")
  order = sorted(first, key=lambda label: label in levels)
  add_legend(figure, [handles[first[label]] for label in order], order, width)
  return figure


def all_domains(runs: Sequence[runs_lib.Run]) -> tuple[str, ...]:
  """Every run's domains, in order of first appearance."""
  names: dict[str, None] = {}
  for run in runs:
    names |= dict.fromkeys(run.domains)
  return tuple(names)


def _curves(ax, runs, key: str, part: str | None) -> None:
  """Faint raw line and smooth line of each run, stages end to end."""
  for number, group in enumerate(runs_lib.group_runs(runs)):
    colour = palette.LINE_COLOURS[number % len(palette.LINE_COLOURS)]
    style = palette.LINE_STYLES[number % len(palette.LINE_STYLES)]
    marker = palette.MARKERS[number % len(palette.MARKERS)]
    for run in group.runs:
      for stage, start in zip(run.stages, _stage_starts(run), strict=True):
        values = stage.series(key, part)
        known = ~np.isnan(values)
        if not known.any():
          continue
        # A domain may be absent from a window: join over the gap.
        steps, values = start + stage.steps[known], values[known]
        ax.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
        ax.plot(
          steps,
          smooth(values),
          color=colour,
          linestyle=style,
          linewidth=1.8,
          marker=marker,
          markersize=4,
          # Several lines' marks must not fall on each other; a short stage
          # may be a single mark.
          markevery=(
            min(number, len(steps) - 1),
            max(1, len(steps) // 6),
          ),
        )


def _stage_starts(run: runs_lib.Run) -> list[int]:
  """The step at which each stage starts when stages stand end to end."""
  ends = np.cumsum([stage.steps.max(initial=0) for stage in run.stages])
  return [0, *(int(end) for end in ends[:-1])]


def _finish_steps(ax, runs: Sequence[runs_lib.Run]) -> None:
  """Stage boundaries as vertical lines."""
  bounds = {start for run in runs for start in _stage_starts(run)[1:]}
  for bound in sorted(bounds):
    ax.axvline(bound, color="0.35", linestyle=(0, (4, 3)), linewidth=1)
  ax.set_xlim(left=0)
  ax.set_xlabel("step", fontsize=_FONT_POINTS)
  ax.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(5, integer=True))


def _stage_note(runs: Sequence[runs_lib.Run], width: float) -> str | None:
  """Where stages end, "base to 300, mole to 500", wrapped to `width` inches.

  A line for each way to part steps into stages; None where none has two.
  """
  names: dict[str, dict[str, None]] = {}
  for run in runs:
    ends = np.cumsum([stage.steps.max(initial=0) for stage in run.stages])
    parts = [
      f"{stage.name} to {end:,}"
      for stage, end in zip(run.stages, ends, strict=True)
    ]
    names.setdefault(", ".join(parts), {})[run.name] = None
  if all(len(run.stages) < 2 for run in runs):
    return None
  lines = [
    "stages: " + text
    if len(names) == 1
    else f"stages of {', '.join(of)}: {text}"
    for text, of in names.items()
  ]
  # About 0.075 inch a letter at 9 points.
  size = int(width / 0.075)
  return "\n".join(textwrap.fill(line, size) for line in lines)


def _set_loss_scale(*axes: matplotlib.axes.Axes) -> None:
  """Log scale where losses in the panels span more than a factor of four."""
  lines = [line.get_ydata() for ax in axes for line in ax.lines]
  values = np.concatenate([np.asarray(line, float) for line in lines] or [[]])
  values = values[np.isfinite(values)]
  if not values.size or values.min() <= 0 or np.ptp(np.log(values)) < np.log(4):
    return
  for ax in axes:
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
    ax.yaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())


def _run_handles(runs):
  """Legend entries of `_curves`: one a name, with its line and mark."""
  handles, labels = [], []
  for number, group in enumerate(runs_lib.group_runs(runs)):
    handles.append(
      matplotlib.lines.Line2D(
        [],
        [],
        color=palette.LINE_COLOURS[number % len(palette.LINE_COLOURS)],
        linestyle=palette.LINE_STYLES[number % len(palette.LINE_STYLES)],
        marker=palette.MARKERS[number % len(palette.MARKERS)],
        markersize=4,
      )
    )
    labels.append(group.label)
  return handles, labels
