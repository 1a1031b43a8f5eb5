"""Which tokens experts serve, by layer: pictures of routing.json."""

import math
from typing import Any

import matplotlib.figure
import matplotlib.lines
import matplotlib.patches
import numpy as np

from mole_jax.reporting import figures, palette
from mole_jax.reporting import routing as routing_lib


def expert_activation(
  routing: dict[str, Any], by_modality: bool = False
) -> matplotlib.figure.Figure:
  """Share of tokens by layer, expert and domain: LLaVA-MoLE's figure 6.

  A panel a domain (with `by_modality`, one for image and one for text
  tokens), a stacked bar a layer. Hatches repeat what colours say.
  """
  domains = tuple(routing["counts"])
  num_layers, num_experts = routing["num_layers"], routing["num_experts"]
  kinds = routing_lib.MODALITIES if by_modality else (None,)
  # Thirty bars want the page's width; four do not.
  is_deep = num_layers > 12
  shape = (len(domains), len(kinds)) if is_deep else (len(kinds), len(domains))
  panel_width = (9.5 / len(kinds)) if is_deep else 3.1
  width = max(6.5, panel_width * shape[1])
  figure = figures.new_figure(width, 2.2 * shape[0] + 0.9)
  axes = figure.subplots(*shape, sharex=True, sharey=True, squeeze=False)
  for row, domain in enumerate(domains):
    for column, kind in enumerate(kinds):
      ax = axes[row, column] if is_deep else axes[column, row]
      title = f"{domain}, {kind} tokens" if kind else domain
      shares = routing_lib.expert_shares(routing, domain, kind)
      _stack(ax, shares, num_experts)
      figures.tidy(ax, title)
  for ax in axes[:, 0]:
    ax.set_ylabel("share of tokens (%)", fontsize=9)
  for ax in axes[-1]:
    figures.label_layers(ax, routing_lib.layers(routing), 16 if is_deep else 12)
    ax.set_ylim(0, 100)
  handles = [figures.swatch(expert) for expert in range(num_experts)]
  labels = [f"expert {expert}" for expert in range(num_experts)]
  figures.add_legend(figure, handles, labels, width)
  return figure


def expert_load(routing: dict[str, Any]) -> matplotlib.figure.Figure:
  """Share of a layer's choices that each expert got; all domains together.

  A panel an expert, a bar a layer, a dashed line at an even load (Lin et al.
  2024, the figure on expert loads).
  """
  figure, axes = _expert_panels(routing)
  shares = 100 * np.nan_to_num(routing_lib.expert_shares(routing))
  even = 100 / routing_lib.experts_by_layer(routing)
  has_expert = routing_lib.has_expert(routing)
  for expert, ax in enumerate(axes):
    here = has_expert[:, expert]
    _bars(ax, np.where(here, shares[:, expert], np.nan), expert)
    _stairs(ax, np.where(here, even, np.nan))
  axes[0].set_ylim(0, 1.05 * max(shares.max(), even.max()))
  axes[0].set_ylabel("share of choices (%)", fontsize=9)
  _legend(figure, routing, {"even load": _dashes()})
  return figure


def modality_share(routing: dict[str, Any]) -> matplotlib.figure.Figure:
  """Of the tokens that an expert serves, how many are image, how many text.

  A panel an expert, a bar a layer, a dashed line at the share of image tokens
  among all (Lin et al. 2024, the figure on modalities).
  """
  figure, axes = _expert_panels(routing)
  shares = 100 * routing_lib.image_shares(routing)
  balanced = 100 * np.nan_to_num(routing_lib.balanced_image_shares(routing))
  has_expert = routing_lib.has_expert(routing)
  handles = {
    f"{name} tokens": matplotlib.patches.Patch(
      facecolor=colour, edgecolor="white", hatch=hatch, linewidth=0.5
    )
    for name, (colour, hatch) in palette.MODALITIES.items()
  }
  handles["image tokens among all"] = _dashes()
  nothing = dict(marker="x", color="black", linestyle="", markersize=5)
  for expert, ax in enumerate(axes):
    image = shares[:, expert]
    for name, heights, bottoms in (
      ("image", image, np.zeros_like(image)),
      ("text", 100 - image, image),
    ):
      colour, hatch = palette.MODALITIES[name]
      ax.bar(
        range(len(image)),
        np.nan_to_num(heights),
        0.86,
        bottom=np.nan_to_num(bottoms),
        color=colour,
        edgecolor="white",
        hatch=hatch,
        linewidth=0,
      )
    _stairs(ax, np.where(has_expert[:, expert], balanced, np.nan))
    idle = np.flatnonzero(np.isnan(image) & has_expert[:, expert])
    if idle.size:
      ax.plot(idle, [5] * len(idle), **nothing)
      handles["no token"] = matplotlib.lines.Line2D([], [], **nothing)
  axes[0].set_ylim(0, 100)
  axes[0].set_ylabel("share of its tokens (%)", fontsize=9)
  _legend(figure, routing, handles)
  return figure


def pathways(
  routing: dict[str, Any], most: int = 10
) -> matplotlib.figure.Figure:
  """The commonest pathways: a row each, its expert in each layer as a cell.

  Bars say what share of the modality's tokens took it. Image tokens and text
  tokens apart, one below the other where there are many layers; a modality
  without tokens is named below. Lin et al. 2024 draw lines between experts,
  which hide each other; rows do not.
  """
  found = {
    name: routing_lib.pathways(routing, name, most)
    for name in routing_lib.MODALITIES
  }
  absent = [f"no {name} tokens" for name, ways in found.items() if ways is None]
  found = {name: ways for name, ways in found.items() if ways is not None}
  cells = max(1.6, 0.27 * routing["num_layers"])
  is_wide = 2 * (cells + 2.2) > 9.5
  shape = (len(found), 1) if is_wide else (1, len(found))
  rows = max(len(ways.shares) for ways in found.values())
  width = max(cells + 2.9, 6.0) if is_wide else (cells + 2.4) * shape[1]
  height = (0.24 * rows + 1.0) * shape[0] + 0.4
  figure = figures.new_figure(width, height)
  parts = figure.subfigures(*shape, squeeze=False).flat
  for part, (name, ways) in zip(parts, found.items(), strict=True):
    left, right = part.subplots(
      1, 2, sharey=True, width_ratios=(cells, 1.6), gridspec_kw={"wspace": 0.02}
    )
    numbers = routing_lib.layers(routing)
    _cells(left, ways.chosen)
    left.set_ylim(rows - 0.5, -0.5)  # Rows of one height in both.
    figures.label_layers(left, numbers, max(4, int(cells / 0.27)))
    _share_bars(right, 100 * ways.shares)
    # Of the subfigure: it is wider than the cells of two layers.
    part.suptitle(
      f"{name} tokens: {100 * ways.shares.sum():.1f}% of {ways.num_tokens:,} "
      f"in {len(ways.shares)} of {ways.num_distinct:,} pathways",
      fontsize=10,
    )
  experts = sorted({int(e) for p in found.values() for e in p.chosen.flat})
  # Cells have numbers in place of hatches.
  swatch = lambda expert: matplotlib.patches.Patch(
    color=palette.expert_colour(expert)
  )
  figures.add_legend(
    figure,
    [swatch(expert) for expert in experts],
    [f"expert {expert}" for expert in experts],
    width,
    ", ".join(absent) or None,
  )
  return figure


def _cells(ax, chosen: np.ndarray) -> None:
  """int[P, L] as a grid of coloured cells with the number in each."""
  for row, layer in np.ndindex(chosen.shape):
    expert = int(chosen[row, layer])
    colour = palette.expert_colour(expert)
    ax.add_patch(
      matplotlib.patches.Rectangle(
        (layer - 0.47, row - 0.42), 0.94, 0.84, facecolor=colour, linewidth=0
      )
    )
    ax.text(
      layer,
      row,
      str(expert),
      ha="center",
      va="center",
      fontsize=7.5,
      color=palette.ink_on(colour),
    ).set_in_layout(False)
  ax.set_yticks(range(len(chosen)), [str(i + 1) for i in range(len(chosen))])
  ax.set_ylabel("pathway", fontsize=9)
  ax.tick_params(labelsize=8, length=0)
  ax.spines[:].set_visible(False)


def _share_bars(ax, shares: np.ndarray) -> None:
  """Horizontal bars with their numbers, percent."""
  ax.barh(range(len(shares)), shares, 0.7, color="0.55")
  for row, share in enumerate(shares):
    ax.text(share, row, f" {share:.1f}%", va="center", fontsize=8)
  # Room for the longest bar's number.
  ax.set_xlim(0, 1.7 * shares.max())
  ax.set_xticks([])
  ax.tick_params(axis="y", length=0, labelleft=False)
  ax.spines[:].set_visible(False)
  ax.set_xlabel("share of tokens", fontsize=9)


def _expert_panels(routing: dict[str, Any]):
  """A figure with a panel an expert, layers on x; grey where it is not."""
  num_experts = routing["num_experts"]
  columns = num_experts
  if num_experts > 4:
    columns = min(4, math.ceil(num_experts / 2))
  rows = math.ceil(num_experts / columns)
  figure = figures.new_figure(9.5, 2.1 * rows + 0.9)
  grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
  axes = grid.flat[:num_experts]
  for ax in grid.flat[num_experts:]:
    ax.remove()
  numbers = routing_lib.layers(routing)
  most = int(32 / columns)
  for expert, ax in enumerate(axes):
    figures.label_layers(ax, numbers, most)
    figures.tidy(ax, f"expert {expert}")
    # Panels in a column share an axis, whose labels the last of them carries.
    is_last = expert + columns >= num_experts
    ax.tick_params(labelbottom=is_last)
    if not is_last:
      ax.set_xlabel("")
    for layer in np.flatnonzero(~routing_lib.has_expert(routing)[:, expert]):
      ax.axvspan(layer - 0.5, layer + 0.5, color="0.9", linewidth=0)
  return figure, axes


def _bars(ax, heights: np.ndarray, expert: int) -> None:
  """A bar a layer in the expert's colour; few have their number written in."""
  colour = palette.expert_colour(expert)
  ax.bar(
    range(len(heights)),
    heights,
    0.86,
    color=colour,
    edgecolor=palette.ink_on(colour),
    hatch=palette.expert_hatch(expert),
    linewidth=0.4,
  )
  for layer, height in enumerate(heights if len(heights) <= 5 else ()):
    if not np.isnan(height):
      # At the foot, where the dashed line seldom is.
      ax.annotate(
        f"{height:.0f}%",
        (layer, 0),
        (0, 4),
        textcoords="offset points",
        ha="center",
        va="bottom",
        fontsize=7,
        bbox=dict(boxstyle="round,pad=0.15", fc="white", ec="none", alpha=0.9),
      ).set_in_layout(False)


def _stairs(ax, levels: np.ndarray) -> None:
  """A dashed level over each layer, white below it: seen on every bar.

  None where NaN.
  """
  edges = np.arange(len(levels) + 1) - 0.5
  for colour, style, width in (("white", "-", 2.6), ("black", "--", 1.2)):
    ax.stairs(
      levels,
      edges,
      baseline=None,
      color=colour,
      linestyle=style,
      linewidth=width,
    )


def _dashes() -> matplotlib.lines.Line2D:
  return matplotlib.lines.Line2D(
    [], [], color="black", linestyle="--", linewidth=1.2
  )


def _legend(figure, routing: dict[str, Any], handles: dict[str, Any]) -> None:
  if not routing_lib.has_expert(routing).all():
    handles["layer without this expert"] = matplotlib.patches.Patch(color="0.9")
  figures.add_legend(figure, list(handles.values()), list(handles), 9.5)


def _stack(ax, shares: np.ndarray, num_experts: int) -> None:
  """A stacked bar a layer; few layers have the expert and share written in."""
  num_layers = len(shares)
  if np.isnan(shares).all():
    ax.text((num_layers - 1) / 2, 50, "no such tokens", ha="center", fontsize=9)
    return
  heights = 100 * np.nan_to_num(shares)
  bottoms = np.cumsum(heights, axis=1) - heights
  for expert in range(num_experts):
    colour = palette.expert_colour(expert)
    ax.bar(
      range(num_layers),
      heights[:, expert],
      0.86,
      bottom=bottoms[:, expert],
      color=colour,
      edgecolor=palette.ink_on(colour),
      hatch=palette.expert_hatch(expert),
      linewidth=0.4,
    )
    for layer in range(num_layers if num_layers <= 12 else 0):
      share = heights[layer, expert]
      if share < 9:
        continue
      ax.text(
        layer,
        bottoms[layer, expert] + share / 2,
        f"{expert}: {share:.0f}%" if num_layers <= 5 else f"{expert}",
        ha="center",
        va="center",
        fontsize=7,
        bbox=dict(boxstyle="round,pad=0.15", fc="white", ec="none", alpha=0.9),
      ).set_in_layout(False)
