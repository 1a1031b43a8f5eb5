"""The command: where it writes, what it prints, how it fails."""

import io
import json

import pytest
import rich.console

from mole_jax import evaluate
from mole_jax.inference import pretrained
from mole_jax.training import base as base_lib
from mole_jax.training import checkpoint, files, state
from tests.inference import tiny
from tests.training import small_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """A run of random parameters, written as training writes one."""
  run = tmp_path_factory.mktemp("run")
  text = small_run.make_tokenizer(run)
  config = small_run.make_config()
  config["data"]["tokenizer"] = str(run / "tokenizer.json")
  config["evaluation"]["datasets"] = {"general": "embedded/general"}
  config["evaluation"]["max_new_tokens"] = 3
  config["evaluation"]["batch_size"] = 4
  assert text.vocab_size <= config["model"]["decoder"]["vocab_size"]
  files.write_json(run / "config.json", config)
  params = tiny.make_params(state.model_config(config, "mole"))
  base = {name: params[name] for name in base_lib.base_shapes(config)}
  written = base_lib.write_base(run / "base", base)
  reference = base_lib.BaseReference("base", written.sha256)
  trainable, _ = state.split(params, config["stages"]["mole"]["trainable"])
  with checkpoint.StageCheckpoints(run / "mole", 2) as checkpoints:
    meta = {"stage": "mole", "base": reference._asdict(), "step": 6}
    saved = state.TrainState(trainable, {"count": trainable["visual_end"]})
    checkpoints.save(6, saved, meta)
  return run


def test_a_part_of_a_split_goes_beside_the_run_s_own(run, capsys):
  arguments = ["--ckpt", str(run), "--max-questions", "4"]
  assert evaluate.main(arguments) == 0
  folder = run / "evaluation-mole-6-test-4"
  metrics = json.loads((folder / "metrics.json").read_text())
  assert metrics["domains"]["general"]["num_questions"] == 4
  assert not (run / "evaluation").exists()
  printed = capsys.readouterr().out
  assert str(folder) in printed and "majority" in printed
  other = run / "elsewhere"
  assert evaluate.main([*arguments, "--out", str(other)]) == 0
  assert json.loads((other / "metrics.json").read_text()) == metrics


def test_only_a_whole_run_writes_what_the_report_reads(run):
  model = pretrained.load(run)
  parse = evaluate._parser().parse_args
  for arguments, name in (
    ([str(run)], "evaluation"),
    ([str(run), "--split", "test"], "evaluation"),
    ([str(run), "--split", "train"], "evaluation-mole-6-train"),
    ([f"{run}/mole"], "evaluation-mole-6-test"),
    ([f"{run}/mole/checkpoints/6"], "evaluation-mole-6-test"),
  ):
    args = parse(["--ckpt", *arguments])
    assert evaluate._directory(args, model) == run / name


@pytest.mark.parametrize(
  ("path", "options", "message"),
  [
    ("none", [], "none does not exist; name a run directory."),
    ("mole/checkpoints/7", [], "does not exist"),
    ("base", [], "base holds no checkpoint yet"),
    ("", ["--split", "tset"], "split='tset' is not in"),
    ("", ["--max-questions", "0"], "--max-questions=0; wanted at least 1."),
  ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
  run, capsys, path, options, message
):
  assert evaluate.main(["--ckpt", str(run / path), *options]) == 2
  lines = capsys.readouterr().err.splitlines()
  assert len(lines) == 1
  assert lines[0].startswith("error: ") and message in lines[0]


def test_the_table_has_a_row_a_domain_and_the_average():
  levels = {"accuracy": 0.5, "majority": 0.25, "blank": 0.125}
  metrics = {
    "name": "x",
    "seed": 1,
    "stage": "mole",
    "step": 6,
    "domains": {
      "general": levels | {"num_questions": 1000},
      "document": levels | {"num_questions": 200, "accuracy": 0.75},
    },
    "average": levels | {"accuracy": 0.625},
  }
  file = io.StringIO()
  console = rich.console.Console(file=file, width=80)
  console.print(evaluate.accuracy_table(metrics))
  rows = [line.split("│") for line in file.getvalue().splitlines()]
  cells = [[cell.strip() for cell in row[1:-1]] for row in rows]
  assert ["general", "1,000", "50.0", "25.0", "12.5"] in cells
  assert ["document", "200", "75.0", "25.0", "12.5"] in cells
  assert ["average", "1,200", "62.5", "25.0", "12.5"] in cells
