import base64
import json
import pathlib
import re

import numpy as np
import pytest

from mole_jax import prepare
from mole_jax.data import records
from mole_jax.data.recipes import table
from tests.data.builders import llava_files
from tests.data.builders.prepared_input import encode

FOLDER = pathlib.Path(table.__file__).parent


def test_a_recipe_is_called_as_its_layout():
  # The name of the layout is what a built set is known by.
  for name, recipe in table.RECIPES.items():
    assert recipe.layout.name == name


@pytest.mark.parametrize(
  ("name", "near"),
  [
    ("m3t", "m3it"),
    ("M3IT", "m3it"),
    ("sharegpt4v_finetun", "sharegpt4v_finetune"),
    ("path_vqa", "pathvqa"),
  ],
)
def test_a_name_that_is_not_known_gives_the_nearest(name, near):
  with pytest.raises(
    ValueError, match=f"--recipe='{name}' .* Did you mean '{near}'"
  ):
    table.find_recipe(name)


def test_a_name_like_none_gives_all():
  with pytest.raises(ValueError, match="wanted one of .*'ureader'") as error:
    table.find_recipe("zzz")
  assert "Did you mean" not in str(error.value)


def test_the_command_of_each_docstring_can_be_typed():
  found = set()
  for file in FOLDER.glob("*.py"):
    text = file.read_text().replace("\\\n", " ")
    for line in re.findall(r"^python -m mole_jax.prepare (.*)$", text, re.M):
      args = prepare._parser().parse_args(line.split())
      assert table.find_recipe(args.recipe)
      found.add(args.recipe)
  # Three originals of hybrid_ft.py, where one command stands for all.
  without = {"llava", "svit", "lvis_instruct4v", "lrv"}
  assert found == set(table.RECIPES) - without


@pytest.fixture
def m3it(tmp_path):
  """A file of M3IT with one record."""
  row = {
    "instruction": "Describe the image.",
    "inputs": "",
    "image_base64_str": [
      base64.b64encode(encode(np.zeros((4, 4, 3)))).decode()
    ],
    "outputs": "Black.",
  }
  return llava_files.write(tmp_path / "m3it.jsonl", [row], "lines")


def build(file, out, *args):
  return prepare.main(
    ["build", f"--json={file}", f"--out={out}", "--name=toy", *args]
  )


@pytest.mark.parametrize(
  ("args", "domain"),
  [
    (["--recipe=m3it"], "general"),
    (["--recipe=m3it", "--domain=mine"], "mine"),
  ],
)
def test_build_takes_the_layout_and_domain_of_a_recipe(
  m3it, tmp_path, args, domain
):
  assert build(m3it, tmp_path / "out", *args) == 0
  folder = tmp_path / "out" / "toy" / "1.0.0"
  (row,) = records.Records(folder, "train")
  assert (row["domain"], row["caption"]) == (domain, "Black.")
  about = json.loads((folder / "prepared.json").read_text())
  assert about["wanted"]["layout"] == "m3it"


def test_without_a_recipe_the_domain_is_the_name(tmp_path):
  file = llava_files.write(tmp_path / "file", [llava_files.entry()], "lines")
  assert build(file, tmp_path / "out") == 0
  (row,) = records.Records(tmp_path / "out" / "toy" / "1.0.0", "train")
  assert row["domain"] == "toy"


def test_validate_reads_a_recipe(m3it, capsys):
  assert prepare.main(["validate", f"--json={m3it}", "--recipe=m3it"]) == 0
  assert "read 1 = used 1" in capsys.readouterr().out
  assert prepare.main(["validate", f"--json={m3it}"]) == 1


@pytest.mark.parametrize("command", ["validate", "build"])
def test_a_wrong_name_is_wrong_usage(m3it, tmp_path, capsys, command):
  args = [command, f"--json={m3it}", "--recipe=m3t"]
  if command == "build":
    args += ["--name=toy", f"--out={tmp_path / 'out'}"]
  assert prepare.main(args) == 2
  assert "Did you mean 'm3it'?" in capsys.readouterr().err
  assert not (tmp_path / "out").exists()
