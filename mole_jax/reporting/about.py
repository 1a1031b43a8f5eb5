"""What was run, as HTML: a table of facts and one of settings that differ."""

import html
from collections.abc import Sequence
from typing import Any

from mole_jax.reporting import routing as routing_lib
from mole_jax.reporting import runs as runs_lib

# So many settings are shown at once: recipes of different kinds differ in a
# hundred, which would stand before the results.
_MAX_OPEN = 20


def about_html(runs: Sequence[runs_lib.Run]) -> str:
  """Facts of each run, what is missing, and in what settings runs differ."""
  facts: dict[str, list[str]] = {"seed": [str(run.seed) for run in runs]}
  facts["steps"] = [
    ", ".join(
      f"{stage.name} {stage.steps.max(initial=0):,}" for stage in run.stages
    )
    for run in runs
  ]
  experts = [_experts(run) for run in runs]
  for key in dict.fromkeys(key for entry in experts for key in entry):
    facts[key] = [entry.get(key, "–") for entry in experts]
  infos = [_leaves(run.info) for run in runs]
  for key in dict.fromkeys(key for info in infos for key in info):
    if key not in ("name", "stages", "seed", "num_steps"):
      facts[key] = [_show(info.get(key)) for info in infos]
  facts["directory"] = [str(run.directory) for run in runs]
  content = _settings_table(runs, facts)
  missing = "".join(
    f"<li>{html.escape(run.label)}: {html.escape(sentence)}</li>"
    for run in runs
    for sentence in run.missing
  )
  if missing:
    content += (
      f'<div class="missing"><b>Not there yet</b><ul>{missing}</ul></div>'
    )
  differing = {
    key: [_show(value) for value in values]
    for key, values in runs_lib.differing_settings(runs).items()
    if key not in ("name", "seed")
  }
  if differing:
    is_open = " open" if len(differing) <= _MAX_OPEN else ""
    content += (
      f"<details{is_open}><summary><h3>Settings that differ, besides name and "
      f"seed: {len(differing)}</h3></summary>"
      f"{_settings_table(runs, differing)}"
      '<p class="how">Every setting that is not listed is the same in all '
      "runs.</p></details>"
    )
  return content


def _experts(run: runs_lib.Run) -> dict[str, str]:
  """What the config and the evaluation say of a run's experts, in words."""
  settings = runs_lib.flatten(run.config)
  of = lambda family, key: settings.get(f"model.{family}.{key}")
  facts = {"experts": _show(run.num_experts)}
  if of("moe", "layers") not in (None, "none"):
    facts["kind of experts"] = "whole FFNs"
    facts["experts a token"] = f"top {of('moe', 'top_k')}"
    facts["layers with experts"] = str(of("moe", "layers"))
    facts["capacity"] = (
      f"{_capacity(of('moe', 'capacity_factor'))} in training, "
      f"{_capacity(of('moe', 'eval_capacity_factor'))} in evaluation"
    )
  elif (of("mole", "num_experts") or 0) > 1:
    facts["kind of experts"] = f"LoRA of rank {_show(of('mole', 'rank'))}"
    facts["experts a token"] = f"top {_show(of('mole', 'top_k'))}"
    facts["layers with experts"] = "all"
    facts["capacity"] = "no limit"
  if run.routing and run.num_experts > 1:
    layers = routing_lib.layers(run.routing)
    experts = routing_lib.experts_by_layer(run.routing).tolist()
    facts["layers with experts"] = _count_layers(run, layers)
    if len(set(experts)) > 1:
      pairs = zip(layers, experts, strict=True)
      facts["experts"] = ", ".join(f"{n} in layer {i}" for i, n in pairs)
  return facts


def _count_layers(run: runs_lib.Run, layers: Sequence[int]) -> str:
  """ "0, 2 (2 of 4)", or "all 4"."""
  total = (run.evaluation or {}).get("num_layers")
  if total == len(layers):
    return f"all {total}"
  names = ", ".join(map(str, layers))
  return f"{names} ({len(layers)} of {total})" if total else names


def _capacity(factor: float) -> str:
  return f"{factor:g} × an even load" if factor else "no limit"


def _settings_table(
  runs: Sequence[runs_lib.Run], rows: dict[str, Sequence[str]]
) -> str:
  """A column for each name; where its runs differ, their values in turn."""
  groups = runs_lib.group_runs(runs)
  head = "".join(f'<th scope="col">{html.escape(g.label)}</th>' for g in groups)
  body = ""
  for key, values in rows.items():
    by_name: dict[str, dict[str, None]] = {g.name: {} for g in groups}
    for run, value in zip(runs, values, strict=True):
      by_name[run.name][value] = None
    cells = "".join(
      f'<td class="setting">{html.escape("; ".join(distinct))}</td>'
      for distinct in by_name.values()
    )
    body += f'<tr><th scope="row">{html.escape(key)}</th>{cells}</tr>'
  return (
    '<div class="scroll"><table class="facts"><thead><tr><th></th>'
    f"{head}</tr></thead><tbody>{body}</tbody></table></div>"
  )


def _leaves(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
  """Nested dicts by dotted key; the innermost dicts stay one value each."""
  flat: dict[str, Any] = {}
  for key, value in tree.items():
    is_inner = isinstance(value, dict) and any(
      isinstance(entry, dict) for entry in value.values()
    )
    if is_inner:
      flat |= _leaves(value, f"{prefix}{key}.")
    else:
      flat[f"{prefix}{key}"] = value
  return flat


def _show(value: Any) -> str:
  if value is None:
    return "–"
  if isinstance(value, int) and not isinstance(value, bool):
    return f"{value:,}"
  if isinstance(value, dict):  # Counts: "1,548 trainable".
    return ", ".join(
      f"{_show(entry)} {key}" for key, entry in value.items() if entry
    )
  return str(value)
