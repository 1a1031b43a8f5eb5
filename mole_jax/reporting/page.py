"""One self-contained HTML page of a run, or of several side by side."""

import html
import io
import pathlib
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import matplotlib.figure
import rich.console

from mole_jax.reporting import (
  about,
  expert_curves,
  expert_figures,
  figures,
  samples,
  tables,
)
from mole_jax.reporting import routing as routing_lib
from mole_jax.reporting import runs as runs_lib

# Greys that print; no colour of the page itself carries meaning.
_CSS = """
:root{color-scheme:light dark;--ink:#1d1f21;--soft:#5b6066;--line:#d4d7da;
--page:#fbfbfa;--card:#fff;--mark:#eceef0}
@media (prefers-color-scheme:dark){:root{--ink:#e4e6e8;--soft:#a2a8ae;
--line:#44494e;--page:#1b1d1f;--card:#25282b;--mark:#33373b}}
*{box-sizing:border-box}
body{margin:0 auto;padding:1.5rem;max-width:72rem;background:var(--page);
color:var(--ink);font:16px/1.5 system-ui,"DejaVu Sans",sans-serif}
h1{font-size:1.7rem;margin:0}h2{margin:2.6rem 0 .6rem;padding-top:.6rem;
border-top:2px solid var(--line);font-size:1.3rem}
h3{font-size:1.05rem;margin:1.2rem 0 .4rem}
summary{cursor:pointer;margin:1.2rem 0 .4rem}summary h3{display:inline}
small{color:var(--soft);font-weight:400}
nav a{color:inherit;margin-right:1rem}
.scroll{overflow-x:auto;margin:.6rem 0;border:1px solid var(--line);
border-radius:6px;background:var(--card)}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:.4rem .8rem;text-align:left;vertical-align:top;
border-bottom:1px solid var(--line);white-space:nowrap}
tbody tr:last-child>*{border-bottom:0}
td small,th small{display:block;font-size:.78rem;line-height:1.35}
td.best{background:var(--mark);box-shadow:inset 3px 0 0 var(--ink)}
tr.mean>*{font-style:italic;border-bottom:2px solid var(--line)}
.facts tbody th{width:16rem}
td.setting{white-space:normal;overflow-wrap:anywhere;min-width:8rem}
.low{font-size:.78rem;border:1px dashed currentColor;border-radius:4px;
padding:0 .25rem}
figure{margin:1rem 0}
figure img{display:block;max-width:100%;height:auto;background:#fff;
padding:.4rem;border:1px solid var(--line);border-radius:6px}
figcaption,.how{color:var(--soft);font-size:.9rem;margin:.4rem 0 0;
max-width:60rem}
.missing{border:1px dashed var(--soft);border-radius:6px;padding:.5rem 1rem;
overflow-wrap:anywhere}
.sample{border:1px solid var(--line);border-radius:6px;padding:.2rem 1rem 1rem;
margin:1rem 0;background:var(--card);break-inside:avoid}
.pair{display:flex;flex-wrap:wrap;gap:1.2rem}
.pair dl{flex:1 1 20rem}
img.seen{width:192px;height:auto;align-self:flex-start;image-rendering:pixelated;
border:1px solid var(--line)}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.2rem 1rem;margin:0;
align-content:start}
dt{color:var(--soft)}dd{margin:0;overflow-wrap:anywhere}
.right,.wrong{font-weight:700;white-space:nowrap}
.wrong{border-bottom:2px dotted currentColor}
.layers{position:sticky;top:0;z-index:1;background:var(--page);
border:1px solid var(--line);border-radius:6px}
.layers label{margin-right:.9rem;white-space:nowrap}
.chips{line-height:2}
.chip{white-space:pre-wrap;border-radius:3px;padding:.1rem .25rem;
margin:0 1px;border:1px solid #888;font:13px/1.4 "DejaVu Sans Mono",monospace;
-webkit-print-color-adjust:exact;print-color-adjust:exact}
.chip sub{font-size:.7em;font-weight:700;margin-left:2px}
@media print{body{max-width:none;padding:0;font-size:11pt}
.layers,nav{display:none}
.scroll{overflow:visible}figure,tr{break-inside:avoid}h2,h3{break-after:avoid}}
"""


def write_report(
  run_dirs: Iterable[str | pathlib.Path],
  out_dir: str | pathlib.Path | None = None,
) -> pathlib.Path:
  """Writes index.html and its pictures as PNGs; returns the page's path.

  Args:
    run_dirs: run directories; the first one's samples are shown.
    out_dir: where to write, made if absent; None is `report` in the first
      run.

  Raises ValueError, naming file and command, where a directory is no run.
  """
  runs = runs_lib.read_runs(run_dirs)
  if not runs:
    raise ValueError("no run directory was given; name at least one.")
  out_dir = pathlib.Path(out_dir or runs[0].directory / "report")
  if out_dir.exists() and not out_dir.is_dir():
    raise ValueError(f"--out={out_dir} is a file; name a directory.")
  out_dir.mkdir(parents=True, exist_ok=True)
  pictures = _Pictures(out_dir)
  path = out_dir / "index.html"
  path.write_text(page_html(runs, pictures), encoding="utf-8")
  return path


def print_accuracy(
  run_dirs: Iterable[str | pathlib.Path],
  console: rich.console.Console | None = None,
) -> None:
  """Prints accuracy by domain of one or several run directories.

  Raises ValueError as `runs.read_run` does. A run without evaluation is
  named below the table.
  """
  console = console or rich.console.Console()
  runs = runs_lib.read_runs(run_dirs)
  if any(run.evaluation for run in runs):
    console.print(tables.rich_table(tables.domain_table(runs)))
  for run in runs:
    for sentence in run.missing:
      console.print(f"{run.label}: {sentence}", markup=False, highlight=False)


def page_html(
  runs: Sequence[runs_lib.Run],
  picture: Callable[[str, matplotlib.figure.Figure, str, str], str],
) -> str:
  """The whole page; `picture(name, figure, alt, caption)` gives its HTML."""
  title = "mole_jax: " + ", ".join(
    group.label for group in runs_lib.group_runs(runs)
  )
  sections = (
    ("runs", "What was run", about.about_html(runs)),
    ("accuracy", "Accuracy on the test split", _accuracy(runs, picture)),
    ("curves", "Training curves", _curves(runs, picture)),
    ("experts", "What the experts do", _experts(runs, picture)),
    ("samples", "Test samples", _samples(runs, picture)),
  )
  links = "".join(f'<a href="#{key}">{name}</a>' for key, name, _ in sections)
  body = "".join(
    f'<section id="{key}"><h2>{name}</h2>{content}</section>'
    for key, name, content in sections
  )
  return (
    '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
    '<meta name="viewport" content="width=device-width,initial-scale=1">'
    f"<title>{html.escape(title)}</title>"
    f"<style>{_CSS}{samples.chip_css()}</style></head><body>"
    f"<h1>{html.escape(title)}</h1><nav>{links}</nav>{body}"
    f"<script>{samples.SCRIPT}</script></body></html>\n"
  )


class _Pictures:
  """Writes each figure as DIR/NAME.png and returns it inlined."""

  def __init__(self, directory: pathlib.Path):
    self._directory = directory

  def __call__(
    self, name: str, figure: matplotlib.figure.Figure, alt: str, caption: str
  ) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    (self._directory / f"{name}.png").write_bytes(buffer.getvalue())
    uri = samples.png_uri(buffer.getvalue())
    width = round(figure.get_figwidth() * 100)
    note = f"<figcaption>{caption}</figcaption>" if caption else ""
    return (
      f'<figure><img width="{width}" src="{uri}" alt="{html.escape(alt)}">'
      f"{note}</figure>"
    )


def _accuracy(runs: Sequence[runs_lib.Run], picture) -> str:
  evaluated = [run for run in runs if run.evaluation]
  if not evaluated:
    return _absent("No run has been evaluated yet.")
  table = tables.domain_table(evaluated)
  content = tables.html_table(table) + _how(
    "Percent of test questions answered right. <i>majority</i>: what always "
    "giving a question type's commonest answer would score; <i>blank</i>: "
    "the same model "
    "with every image blanked. A model that looks must beat both; ▽ marks "
    "where it does not. ★ and the bar mark the best of several names, by their "
    "means. ± is the standard deviation over the runs of one name. "
    "The average is over domains. One run's accuracy on n questions has a "
    "sampling error of up to 50/√n points."
  )
  content += picture(
    "accuracy",
    figures.accuracy_bars(evaluated),
    "Bars of test accuracy by domain",
    "How to read this: the taller the bar above the black line (majority "
    "answer) and the diamond (blank images), the more the model takes from "
    "the image. Over several runs of one name the bar is the mean, dots are "
    "the runs, the whisker is one standard deviation.",
  )
  for table in tables.type_tables(evaluated):
    if table.columns:
      content += f"<h3>{html.escape(table.title)}, by question type</h3>"
      content += tables.html_table(table)
  return content


def _curves(runs: Sequence[runs_lib.Run], picture) -> str:
  return picture(
    "curves",
    figures.training_curves(runs),
    "Loss and next-token accuracy over steps",
    "How to read this: faint lines are what was logged, strong lines a "
    "running mean. Stages stand end to end, parted by dashed lines; their "
    "data differ, so a jump there is no fault. These are training tokens; "
    "answers to unseen images are in the table above.",
  ) + picture(
    "curves_by_domain",
    figures.domain_curves(runs),
    "Loss and next-token accuracy over steps, by domain",
    "How to read this: one column a domain. A domain that rises while "
    "another falls is the conflict that experts are there to relieve.",
  )


def _experts(runs: Sequence[runs_lib.Run], picture) -> str:
  """Maps of the first run of each name; its other seeds have own reports."""
  content = ""
  for group in runs_lib.group_runs(runs):
    run = next((run for run in group.runs if run.routing), group.runs[0])
    if len(runs) > 1:
      content += f"<h3>{html.escape(run.label)}</h3>"
    if run.num_experts == 1:
      content += _absent("One expert (plain LoRA): every token goes to it.")
      continue
    suffix = f"_{_slug(run.label)}" if len(runs) > 1 else ""
    if run.routing:
      content += _expert_maps(run, picture, suffix)
    else:
      content += _absent(
        f"Not evaluated yet: {run.directory / 'evaluation' / 'routing.json'} "
        "is missing."
      )
    if any(stage.has("expert_load") for stage in run.stages):
      content += picture(
        f"experts_over_steps{suffix}",
        expert_curves.routing_curves(run),
        "Expert load and router entropy over steps",
        "How to read this: above, the share of a layer's choices that each "
        "expert got; the dotted line is an even load. A line at 0 is an "
        "expert that starves. Then, how undecided the router is: at the "
        "dotted line it knows nothing, at 0 it is certain. Where experts have "
        "a limited capacity, the share of choices that found no place, and "
        "were dropped, is last. At most four layers are shown, spread over "
        "the depth.",
      )
  return content


def _expert_maps(run: runs_lib.Run, picture, suffix: str) -> str:
  routing = run.routing
  content = picture(
    f"expert_load{suffix}",
    expert_figures.expert_load(routing),
    "Load of each expert by layer",
    "How to read this: a bar is the share of a layer's choices that fell on "
    "this expert, over all test tokens; at the dashed line the load is even. "
    "A token that k experts serve counts k times, so a layer's bars add up to "
    "100% over the experts. Numbers of experts mean nothing across layers. "
    "Choices are counted before any is dropped for lack of capacity."
    f"{_uneven_note(routing)}",
  )
  content += picture(
    f"modality_share{suffix}",
    expert_figures.modality_share(routing),
    "Image and text tokens by expert and layer",
    "How to read this: of the tokens that this expert serves in a layer, how "
    "many are of images (dark) and how many are text (light). The dashed line "
    "is the share of image tokens among all: where bars end there, the expert "
    "takes tokens as they come; far from it, it prefers one modality. A cross "
    "is an expert that served nothing.",
  )
  if "pathways" in routing:
    content += picture(
      f"pathways{suffix}",
      expert_figures.pathways(routing),
      "The commonest pathways of image tokens and of text tokens",
      "How to read this: a row is a pathway, the expert that a token chose "
      "first in each layer with experts; the bar is the share of all tokens of "
      "that modality that took exactly this one. The title says how much the "
      "rows cover: many pathways with small shares mean that the rows are "
      "examples, not a summary. Second choices are not shown.",
    )
  else:
    content += _absent(
      "No pathways: this evaluation was written before they were counted; "
      f"`python -m mole_jax.evaluate --ckpt {run.directory}` counts them."
    )
  return (
    content
    + picture(
      f"expert_activation{suffix}",
      expert_figures.expert_activation(routing),
      "Share of tokens by layer, expert and domain",
      "How to read this (LLaVA-MoLE's figure 6): a bar is a layer, its parts "
      "are the shares of that domain's test tokens that each expert got. Where "
      "panels differ at a layer, its router tells the domains apart; where "
      "they agree it does not. As above, a token that k experts serve counts k "
      "times.",
    )
    + picture(
      f"expert_modality{suffix}",
      expert_figures.expert_activation(routing, by_modality=True),
      "Share of image and of text tokens by layer, expert and domain",
      "How to read this: the same, image tokens apart from text tokens. A "
      "layer may part the two modalities before it parts the domains.",
    )
  )


def _uneven_note(routing: dict[str, Any]) -> str:
  """Where layers have different numbers of experts, what that looks like."""
  if routing_lib.has_expert(routing).all():
    return ""
  return (
    " Layers have different numbers of experts: grey is a layer that has no "
    "expert of this number, and the even load differs by layer."
  )


def _samples(runs: Sequence[runs_lib.Run], picture) -> str:
  run, others = runs[0], runs[1:]
  if not run.samples:
    return _absent(
      f"Not there yet: {run.directory / 'evaluation' / 'samples.json'} is "
      "missing."
    )
  num_layers = max(
    (len(t["experts"]) for s in run.samples for t in s["tokens"]), default=0
  )
  articles = []
  for number in range(len(run.samples)):
    figure = samples.overlay_figure(run, number)
    overlay = ""
    if figure is not None:
      overlay = picture(
        f"patches_{number:02}", figure, "Image patches by expert", ""
      )
    articles.append(samples.sample_html(run, others, number, overlay))
  return (
    _how(
      f"From {html.escape(run.label)}. How to read this: each token of "
      "question and prediction carries the number of the expert that a layer "
      "sent it to, of several the likeliest first, and the colour of that one; "
      "choose the layer here. Below them, the image's patches by their first "
      "choice for a few layers."
    )
    + (
      samples.layer_choice(run.layer_numbers(num_layers)) if num_layers else ""
    )
    + "".join(articles)
  )


def _how(text: str) -> str:
  return f'<p class="how">{text}</p>'


def _absent(text: str) -> str:
  return f'<p class="missing">{html.escape(text)}</p>'


def _slug(text: str) -> str:
  """A label as a file name; what is not a letter or digit becomes "_"."""
  return re.sub(r"[^A-Za-z0-9.-]+", "_", text).strip("_")
