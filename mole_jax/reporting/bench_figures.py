"""Pictures of what `bench` wrote: costs against work, strategies, sides."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.figure
import matplotlib.ticker

from mole_jax.reporting import figures, palette

# Title and key of the costs of a point.
_COSTS = (
  ("a step (s)", "step_seconds"),
  ("compiling (s)", "compile_seconds"),
  ("peak memory (GiB)", "peak_gib"),
)
_RECORD_COSTS = (
  ("opening, first time (s)", "count_seconds"),
  ("to the first batch, again (s)", "first_batch_seconds"),
  ("peak memory (GiB)", "peak_gib"),
)
_UNITS = {
  "tokens": "tokens in a row",
  "layers": "layers",
  "experts": "experts",
  "records": "records in a data set",
}


def draw(
  files: Sequence[pathlib.Path], out: pathlib.Path
) -> list[pathlib.Path]:
  """Writes one PNG for each file that `bench` wrote; returns their paths.

  Raises ValueError for a file that is no bench's, is not whole, or is of a
  command without a picture, and for two files of one name.
  """
  made: list[pathlib.Path] = []
  for file in files:
    try:
      found = json.loads(file.read_text())
      command = found["command"]
    except (ValueError, KeyError, TypeError):
      raise ValueError(
        f"{file} is not what `bench ... --json` writes."
      ) from None
    if command not in _DRAWN:
      raise ValueError(
        f"{file} is of `bench {command}`, which has no picture; there are of "
        f"{', '.join(_DRAWN)}."
      )
    path = out / f"{file.stem}.png"
    if path in made:
      raise ValueError(
        f"{file} would be drawn over another file's {path}; rename one."
      )
    try:
      figure = _DRAWN[command](found)
      title = _title(found)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
      raise ValueError(
        f"{file} is of `bench {command}`, but not all of it is there "
        f"({type(error).__name__}: {error}); run that again."
      ) from error
    figure.suptitle(title, fontsize=9, x=0.01, ha="left", color="0.3")
    out.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    made.append(path)
  return made


def _title(found: Mapping[str, Any]) -> str:
  """What was timed, where, and of which commit."""
  machine = found["machine"]
  parts = [machine["device_kind"]]
  if machine["device_kind"] == "cpu":
    parts = [f"{machine['cpu']}, {machine['num_cores']} cores"]
  if "config" in found:
    parts.insert(0, f"{found['config']}:{found['variant']}")
  commit, _, state = (found["commit"] or "unknown").partition("-")
  commit = f"commit {commit[:7]} {state}".strip()
  parts += [f"jax {found['versions']['jax']}", commit]
  return "; ".join(str(part) for part in parts)


def cost_curves(bench: Mapping[str, Any]) -> matplotlib.figure.Figure:
  """A row for each curve, a panel for each cost; both axes are logarithmic.

  The dashed line through the first point is what linear would be.
  """
  rows = bench["curves"]
  figure = figures.new_figure(9.5, 2.5 * len(rows) + 0.5)
  panels = figure.subplots(len(rows), len(_COSTS), squeeze=False)
  for axes, (name, curve) in zip(panels, rows.items(), strict=True):
    sizes = [point["size"] for point in curve["points"]]
    costs_of = _RECORD_COSTS if name == "records" else _COSTS
    for ax, (title, key) in zip(axes, costs_of, strict=True):
      found = [point[key] for point in curve["points"]]
      costs = [x["median"] if isinstance(x, dict) else x for x in found]
      power = curve["powers"][key]
      note = "" if power is None else f", power {power:.2f}"
      figures.tidy(ax, f"{title}{note}")
      ax.plot(sizes, costs, "o-", color=palette.LINE_COLOURS[0], markersize=4)
      linear = [costs[0] * size / sizes[0] for size in sizes]
      (line,) = ax.plot(sizes, linear, "--", color="0.5", linewidth=1)
      ax.set_xscale("log", base=2)
      ax.set_yscale("log", base=2)
      ax.set_ylim(0.7 * min(costs), 1.4 * max(costs))
      for axis in (ax.xaxis, ax.yaxis):
        # "%g" would write a million as 1e+06.
        axis.set_major_formatter(lambda value, _: f"{value:,.7g}")
        axis.set_minor_locator(matplotlib.ticker.NullLocator())
      ax.set_xticks(sizes)
      ax.set_yticks(_ticks(costs))
      ax.set_xlabel(_UNITS.get(name, name), fontsize=9)
  figures.add_legend(figure, [line], ["linear"], 9.5)
  return figure


def _ticks(costs: Sequence[float]) -> list[float]:
  """The first and last cost, rounded, and powers of two between."""
  ends = [float(f"{cost:.2g}") for cost in (min(costs), max(costs))]
  between = [2.0**n for n in range(-12, 13)]
  inside = [tick for tick in between if 1.3 * ends[0] < tick < ends[1] / 1.3]
  every = -(-len(inside) // 4) or 1
  return sorted({*ends, *inside[::every]})


def dispatch_bars(found: Mapping[str, Any]) -> matplotlib.figure.Figure:
  """Seconds over plain LoRA by number of experts, a line for each strategy."""
  rows = [row for row in found["rows"] if row["num_experts"] > 1]
  figure = figures.new_figure(6.5, 3.6)
  ax = figure.subplots()
  figures.tidy(ax, "One MLP: seconds over those of plain LoRA")
  for number, strategy in enumerate(dict.fromkeys(r["strategy"] for r in rows)):
    own = [row for row in rows if row["strategy"] == strategy]
    ax.plot(
      [row["num_experts"] for row in own],
      [row["over_lora"]["median"] for row in own],
      marker=palette.MARKERS[number % len(palette.MARKERS)],
      color=palette.LINE_COLOURS[number % len(palette.LINE_COLOURS)],
      label=strategy,
    )
  ax.axhline(1, color="0.4", linestyle=":", linewidth=1, label="plain LoRA")
  ax.set_xscale("log", base=2)
  ax.xaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
  ax.set_xticks(sorted({row["num_experts"] for row in rows}))
  ax.set_xlabel("experts", fontsize=9)
  ax.set_ylim(bottom=0)
  figures.add_legend(figure, *ax.get_legend_handles_labels(), 6.5)
  return figure


def side_bars(found: Mapping[str, Any]) -> matplotlib.figure.Figure:
  """Seconds a step and peak memory of each side."""
  sides = found["sides"]
  figure = figures.new_figure(6.5, 2.8)
  costs = (
    ("a step (s)", lambda side: side["step_seconds"]["median"]),
    ("peak memory (GiB)", lambda side: side["memory"]["peak_gib"]),
  )
  for ax, (title, cost) in zip(figure.subplots(1, 2), costs, strict=True):
    figures.tidy(ax, title)
    heights = [cost(side) for side in sides.values()]
    bars = ax.bar(
      range(len(sides)),
      heights,
      width=0.6,
      color=[palette.LINE_COLOURS[i] for i in range(len(sides))],
    )
    ax.bar_label(bars, [f"{height:.3g}" for height in heights], fontsize=9)
    ax.set_xticks(range(len(sides)), list(sides))
    ax.set_ylim(0, 1.15 * max(heights))
  return figure


_DRAWN = {
  "curves": cost_curves,
  "dispatch": dispatch_bars,
  "compare": side_bars,
}
