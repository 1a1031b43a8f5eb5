"""Pictures of what experts do: over steps, by layer and domain, on patches."""

from collections.abc import Sequence
from typing import Any

import matplotlib.colors
import matplotlib.figure
import matplotlib.patches
import matplotlib.ticker
import numpy as np

from mole_jax.reporting import figures, palette
from mole_jax.reporting import runs as runs_lib

_MODALITIES = ("image", "text")


def choose_layers(num_layers: int, most: int = 4) -> tuple[int, ...]:
  """At most `most` layers, evenly spread, the first and last among them."""
  places = np.linspace(0, num_layers - 1, min(most, num_layers))
  return tuple(int(round(place)) for place in places)


def routing_curves(run: runs_lib.Run) -> matplotlib.figure.Figure:
  """Expert load (top, a panel a layer) and router entropy over steps.

  Of the last stage that routed; four layers at most. ValueError where no
  stage of the run has logged an expert load.
  """
  stages = [stage for stage in run.stages if stage.has("expert_load")]
  if not stages:
    raise ValueError(
      f"run {run.directory} has logged no expert_load; a stage that trains "
      "experts writes it."
    )
  stage = stages[-1]
  load = stage.series("expert_load")
  entropy = stage.series("router_entropy")
  num_layers, num_experts = load.shape[1:]
  layers = choose_layers(num_layers)

  figure = figures.new_figure(9.5, 5.2)
  top, bottom = figure.subfigures(2, 1, height_ratios=(1.15, 1))
  axes = top.subplots(1, len(layers), sharey=True, squeeze=False)[0]
  for ax, layer in zip(axes, layers, strict=True):
    for expert in range(num_experts):
      ax.plot(
        stage.steps,
        100 * load[:, layer, expert],
        **_line(expert),
        markevery=(expert, max(1, len(load) // 5)),
        label=f"expert {expert}",
      )
    ax.axhline(100 / num_experts, color="0.4", linestyle=":", linewidth=1)
    figures.tidy(ax, f"layer {layer}")
    ax.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(4, integer=True))
  axes[0].set_ylim(bottom=-1)
  axes[0].set_ylabel("share of tokens (%)", fontsize=9)
  figures.add_legend(top, *axes[0].get_legend_handles_labels(), 9.5)

  ax = bottom.subplots()
  for number, layer in enumerate(layers):
    if entropy.ndim == 2:
      ax.plot(
        stage.steps,
        entropy[:, layer],
        **_line(number, palette.LINE_COLOURS),
        markevery=(number, max(1, len(load) // 8)),
        label=f"layer {layer}",
      )
  if num_experts > 1:
    ax.axhline(
      np.log(num_experts),
      color="0.4",
      linestyle=":",
      linewidth=1,
      label=f"uniform over {num_experts} experts",
    )
  figures.tidy(ax, "Router entropy (nats)")
  ax.set_ylim(bottom=0, top=max(0.1, 1.08 * np.log(num_experts)))
  ax.set_xlabel(f"step of stage {stage.name}", fontsize=9)
  ax.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(6, integer=True))
  figures.add_legend(bottom, *ax.get_legend_handles_labels(), 9.5)
  return figure


def expert_shares(
  routing: dict[str, Any], domain: str, modality: str | None = None
) -> np.ndarray:
  """float[L, E]: share of a domain's tokens that each expert got.

  `modality` is "image", "text" or None for both. NaN in a layer that saw no
  token.
  """
  counts = routing["counts"][domain]
  chosen = _MODALITIES if modality is None else (modality,)
  total = sum(np.asarray(counts[name], float) for name in chosen)
  size = total.sum(axis=-1, keepdims=True)
  return np.divide(
    total, size, out=np.full(total.shape, np.nan), where=size > 0
  )


def expert_activation(
  routing: dict[str, Any], by_modality: bool = False
) -> matplotlib.figure.Figure:
  """Share of tokens by layer, expert and domain: the paper's figure 6.

  A panel a domain (with `by_modality`, one for image and one for text
  tokens), a stacked bar a layer. Hatches repeat what colours say.
  """
  domains = tuple(routing["counts"])
  num_layers, num_experts = routing["num_layers"], routing["num_experts"]
  kinds = _MODALITIES if by_modality else (None,)
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
      _stack(ax, expert_shares(routing, domain, kind), num_experts)
      figures.tidy(ax, title)
  for ax in axes[:, 0]:
    ax.set_ylabel("share of tokens (%)", fontsize=9)
  for ax in axes[-1]:
    ax.set_xlabel("layer", fontsize=9)
    ax.set_xlim(-0.6, num_layers - 0.4)
    ax.xaxis.set_major_locator(
      matplotlib.ticker.MultipleLocator(4 if is_deep else 1)
    )
    ax.set_ylim(0, 100)
  handles = [_swatch(expert) for expert in range(num_experts)]
  labels = [f"expert {expert}" for expert in range(num_experts)]
  figures.add_legend(figure, handles, labels, width)
  return figure


def patch_maps(
  image: np.ndarray,
  image_experts: Sequence[Sequence[int]],
  patches: tuple[int, int],
  layers: Sequence[int],
) -> matplotlib.figure.Figure:
  """An image, then the same with each patch tinted by its expert.

  Args:
    image: uint8[H, W, 3], as the model saw it.
    image_experts: expert of each patch, row-major, for each layer.
    patches: rows and columns of patches.
    layers: the layers to draw.

  Raises ValueError where the experts of a layer are not rows x columns.
  """
  rows, columns = patches
  height, width = image.shape[:2]
  panels = len(layers) + 1
  # Height follows the image so that no panel is left half empty.
  side = 1.9
  figure = figures.new_figure(side * panels, side * height / width + 0.75)
  axes = figure.subplots(1, panels, squeeze=False)[0]
  grey = image @ np.array([0.299, 0.587, 0.114])
  axes[0].imshow(image, interpolation="nearest")
  axes[0].set_title("image", fontsize=9)
  seen: set[int] = set()
  for ax, layer in zip(axes[1:], layers, strict=True):
    chosen = np.asarray(image_experts[layer])
    if chosen.size != rows * columns:
      raise ValueError(
        f"image_experts[{layer}] has {chosen.size} patches; patches="
        f"{list(patches)} wants {rows * columns}."
      )
    seen |= set(chosen.tolist())
    ax.imshow(grey, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    _tint(ax, chosen.reshape(rows, columns), height, width)
    ax.set_title(f"layer {layer}", fontsize=9)
  for ax in axes:
    ax.set_xticks([])
    ax.set_yticks([])
  experts = sorted(seen)
  figures.add_legend(
    figure,
    [_swatch(expert) for expert in experts],
    [f"expert {expert}" for expert in experts],
    side * panels,
  )
  return figure


def _line(number: int, colours: Sequence[str] = palette.EXPERT_COLOURS):
  return dict(
    color=colours[number % len(colours)],
    linestyle=palette.LINE_STYLES[number % len(palette.LINE_STYLES)],
    marker=palette.MARKERS[number % len(palette.MARKERS)],
    markersize=4.5,
    markeredgecolor="black",  # Yellow on white is seen by its marks.
    markeredgewidth=0.6,
    linewidth=1.5,
  )


def _swatch(expert: int) -> matplotlib.patches.Patch:
  colour = palette.expert_colour(expert)
  return matplotlib.patches.Patch(
    facecolor=colour,
    edgecolor=palette.ink_on(colour),
    hatch=palette.expert_hatch(expert),
    linewidth=0.5,
  )


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


def _tint(ax, chosen: np.ndarray, height: int, width: int) -> None:
  """Colours the patches of each expert; its number or hatch in each."""
  rows, columns = chosen.shape
  xs = np.linspace(0, width, columns + 1) - 0.5
  ys = np.linspace(0, height, rows + 1) - 0.5
  is_small = max(rows, columns) <= 12
  for expert in np.unique(chosen).tolist():
    colour = palette.expert_colour(expert)
    ax.pcolor(
      xs,
      ys,
      np.ma.masked_array(np.ones(chosen.shape), chosen != expert),
      cmap=matplotlib.colors.ListedColormap([colour]),
      alpha=0.55,
      edgecolor="white" if is_small else palette.ink_on(colour),
      linewidth=0.5 if is_small else 0,
      hatch=None if is_small else palette.expert_hatch(expert),
    )
  if not is_small:
    return
  for row, column in np.ndindex(chosen.shape):
    expert = int(chosen[row, column])
    ax.text(
      (xs[column] + xs[column + 1]) / 2,
      (ys[row] + ys[row + 1]) / 2,
      str(expert),
      ha="center",
      va="center",
      fontsize=7,
      fontweight="bold",
      color=palette.ink_on(palette.expert_colour(expert)),
    ).set_in_layout(False)
