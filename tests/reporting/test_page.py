"""The HTML page: self-contained, complete, escaped, honest about gaps."""

import base64
import html.parser
import io
import json
import re
import subprocess
import sys

import pytest
import rich.console

from mole_jax.reporting import page, runs
from tests.reporting.run_directories import write_moe_run, write_run


class Tags(html.parser.HTMLParser):
  """Every start tag with its attributes, and whether all are closed."""

  VOID = {"img", "meta", "input", "br", "wbr", "link", "hr"}

  def __init__(self, text):
    super().__init__()
    self.found, self.open = [], []
    self.feed(text)

  def handle_starttag(self, tag, attrs):
    self.found.append((tag, dict(attrs)))
    if tag not in self.VOID:
      self.open.append(tag)

  def handle_endtag(self, tag):
    assert self.open.pop() == tag, f"</{tag}> closes another tag"


QUESTION = "<script>alert('x')</script> & <b>which?</b>"


def without_pictures(text):
  return re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]+", "", text)


def not_drawn(name, figure, alt, caption):
  """Stands for a picture where a test reads only text."""
  return f"[{name}]"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  root = tmp_path_factory.mktemp("runs")
  return runs.read_runs(
    [
      write_run(root / "mole3", question=QUESTION),
      write_run(root / "lora", "lora", num_experts=1, question=QUESTION),
    ]
  )


@pytest.fixture(scope="module")
def text(made):
  return page.page_html(made, not_drawn)


def test_the_page_loads_nothing_from_elsewhere(tmp_path):
  directory = write_run(tmp_path / "run", question=QUESTION, num_samples=2)
  path = page.write_report([directory], tmp_path / "out")
  text = path.read_text()
  tags = Tags(text)
  assert not tags.open
  for tag, attributes in tags.found:
    for name in ("src", "href", "srcset", "data", "action"):
      value = attributes.get(name)
      assert value is None or value.startswith(("data:", "#")), (tag, value)
    assert tag not in ("link", "iframe", "object", "embed", "base")
  assert not re.search(r"https?:|@import|url\(", without_pictures(text))
  # Each picture stands beside the page too, byte for byte.
  files = sorted((tmp_path / "out").glob("*.png"))
  assert [file.stem for file in files] == sorted(
    [
      *("curves", "curves_by_domain", "accuracy"),
      *("expert_load", "modality_share"),
      *("expert_activation", "expert_modality", "experts_over_steps"),
      *("patches_00", "patches_01"),
    ]
  )
  for file in files:
    assert base64.b64encode(file.read_bytes()).decode() in text


def test_twelve_samples_are_there_with_their_verdicts(text):
  tags = Tags(text).found
  articles = [a["id"] for tag, a in tags if tag == "article"]
  assert articles == [f"sample-{number}" for number in range(1, 13)]
  seen = [a for tag, a in tags if a.get("class") == "seen"]
  assert len(seen) == 11  # The last sample has no image.
  assert "image-rendering:pixelated" in text
  # Mole is wrong on every third; lora's predictions stand beside them.
  assert text.count("✗ wrong") == 8 and text.count("✓ right") == 16


def test_text_of_a_run_is_escaped(text):
  tags = [tag for tag, _ in Tags(text).found]
  assert tags.count("script") == 1  # Ours.
  assert "&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt; &amp;" in text


def test_chips_carry_every_layer_and_start_at_the_chosen_one(made, text):
  samples = made[0].samples
  found = Tags(text).found
  chips = [a for _, a in found if a.get("class", "").startswith("chip ")]
  tokens = [token for sample in samples for token in sample["tokens"]]
  assert len(chips) == len(tokens)
  for chip, token in zip(chips, tokens, strict=True):
    assert chip["data-experts"].split() == [str(e) for e in token["experts"]]
    assert chip["class"] == f"chip x{token['experts'][2]}"
  radios = [a for _, a in found if a.get("name") == "layer"]
  assert [a["value"] for a in radios] == ["0", "1", "2", "3"]
  assert [a["value"] for a in radios if "checked" in a] == ["2"]


def test_every_picture_has_its_place(text):
  names = re.findall(r"\[([a-z_0-9]+)\]", text)
  assert names == [
    *("accuracy", "curves", "curves_by_domain"),
    *("expert_load_mole3", "modality_share_mole3"),
    *("expert_activation_mole3", "expert_modality_mole3"),
    "experts_over_steps_mole3",
    *(f"patches_{number:02}" for number in range(11)),
  ]


def test_runs_stand_side_by_side_with_what_differs(text):
  assert "model.mole.num_experts" in text
  # Parameter counts of run.json.
  assert "parameters.mole.lora" in text
  assert "1,234,567 trainable, 7,654,321 frozen" in text
  assert "One expert (plain LoRA)" in text


def test_settings_that_differ_are_folded_where_they_are_many(text, tmp_path):
  assert re.search(r"<details open><summary><h3>Settings that differ", text)
  made = [write_run(tmp_path / name, num_samples=1) for name in ("a", "b")]
  path = made[1] / "config.json"
  config = json.loads(path.read_text())
  config["other"] = {f"setting{number}": number for number in range(30)}
  path.write_text(json.dumps(config))
  many = page.page_html(runs.read_runs(made), not_drawn)
  assert "<details><summary><h3>Settings that differ" in many
  assert "besides name and seed: 30<" in many and "other.setting29" in many


def test_a_run_without_evaluation_has_a_page_that_says_so(tmp_path):
  directory = write_run(tmp_path / "run", is_evaluated=False)
  path = page.write_report([directory])
  assert path == directory / "report" / "index.html"
  text = path.read_text()
  assert (path.parent / "curves.png").is_file()
  assert not (path.parent / "accuracy.png").exists()
  for file in ("metrics.json", "routing.json", "samples.json"):
    assert f"{directory / 'evaluation' / file} is missing" in text


@pytest.mark.parametrize("value", [None, float("nan")])
def test_null_and_nan_metrics_are_a_dash(tmp_path, value):
  directory = write_run(tmp_path / "run", num_samples=1)
  path = directory / "evaluation" / "metrics.json"
  metrics = json.loads(path.read_text())
  for key in ("accuracy", "majority", "blank"):
    metrics["domains"]["document"][key] = value
    metrics["average"][key] = value
  path.write_text(json.dumps(metrics))
  text = page.page_html(runs.read_runs([directory]), not_drawn)
  assert text.count('<td class="none">–</td>') == 3  # And one type.
  assert not re.search(r"\bnan\b", without_pictures(text))


def test_no_run_and_a_file_as_output_are_refused(tmp_path):
  with pytest.raises(ValueError, match="no run directory"):
    page.write_report([])
  directory = write_run(tmp_path / "run", is_evaluated=False)
  (tmp_path / "file").write_text("")
  with pytest.raises(ValueError, match="is a file; name a directory"):
    page.write_report([directory], tmp_path / "file")


def test_reporting_imports_neither_jax_nor_models():
  code = (
    "import sys, mole_jax.report\n"
    "heavy = {'jax', 'flax', 'tensorboardX', 'torch', 'tensorflow'}\n"
    "print(sorted(heavy & set(sys.modules)))\n"
    "print([m for m in sys.modules if m.startswith('mole_jax.') and not\n"
    "       m.startswith('mole_jax.report')])"
  )
  done = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, check=True
  )
  assert done.stdout == "[]\n[]\n"


def test_the_terminal_table_has_each_accuracy_and_its_baselines(tmp_path):
  directory = write_run(tmp_path / "run")
  young = write_run(tmp_path / "young", "young", is_evaluated=False)
  out = io.StringIO()
  console = rich.console.Console(file=out, width=200)
  page.print_accuracy([directory, young], console)
  text = out.getvalue()
  (run,) = runs.read_runs([directory])
  for entry in run.evaluation["domains"].values():
    for key in ("accuracy", "majority", "blank"):
      assert f"{100 * entry[key]:.1f}" in text
  assert f"{young / 'evaluation' / 'metrics.json'} is missing" in text


@pytest.fixture(scope="module")
def moe(tmp_path_factory):
  """A run whose layers 0, 4 and 6 have experts, and its page."""
  directory = tmp_path_factory.mktemp("moe") / "run"
  made = runs.read_runs([write_moe_run(directory, {0: 4, 4: 2, 6: 4}, 8)])
  captioned = lambda name, figure, alt, caption: f"[{name}] {caption}"
  return made[0], page.page_html(made, captioned)


def test_facts_tell_experts_choices_layers_and_capacity(moe):
  _, text = moe
  cell = '<tr><th scope="row">{}</th><td class="setting">{}</td></tr>'
  for key, value in {
    "experts": "4 in layer 0, 2 in layer 4, 4 in layer 6",
    "kind of experts": "whole FFNs",
    "experts a token": "top 2",
    "layers with experts": "0, 4, 6 (3 of 8)",
    "capacity": "1.5 × an even load in training, 2 × an even load in "
    "evaluation",
  }.items():
    assert cell.format(key, value) in text


def test_captions_tell_of_layers_with_fewer_experts(moe):
  assert "grey is a layer that has no expert of this number" in moe[1]


def test_chips_name_both_choices_and_buttons_the_layers_of_the_decoder(moe):
  run, text = moe
  found = Tags(text).found
  chips = [a for _, a in found if a.get("class", "").startswith("chip ")]
  token = run.samples[0]["tokens"][0]
  pairs = [f"{a},{b}" for a, b in token["choices"]]
  assert chips[0]["data-experts"] == " ".join(pairs)
  assert chips[0]["class"] == f"chip x{token['experts'][1]}"
  assert f"<sub>{pairs[1]}</sub>" in text
  labels = re.findall(r"(?:checked)?>(\d+)</label>", text)
  assert labels == ["0", "4", "6"]


def test_a_run_with_full_ffn_experts_has_all_its_pictures(moe):
  names = re.findall(r"\[([a-z_0-9]+)\]", moe[1])
  assert names[:8] == [
    *("accuracy", "curves", "curves_by_domain"),
    *("expert_load", "modality_share", "pathways"),
    *("expert_activation", "expert_modality"),
  ]


def test_an_evaluation_from_before_pathways_says_how_to_count_them(text):
  assert "No pathways" in text and "mole_jax.evaluate --ckpt" in text
