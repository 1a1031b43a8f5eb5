"""The command as a user types it."""

import json
import re
import subprocess
import sys

import pytest
from PIL import Image

from mole_jax import prepare
from mole_jax.data.tokenizer import EMBEDDED_TOKENIZER


@pytest.fixture
def data(tmp_path):
  """train.json and pictures, ten good entries; entry 3 has no image."""
  folder = tmp_path / "pictures"
  folder.mkdir()
  rows = []
  for i in range(10):
    Image.new("RGB", (20 + i, 10)).save(folder / f"{i}.jpg")
    turns = [
      {"from": "human", "value": "<image>\nWhat?"},
      {"from": "gpt", "value": f"Picture {i}."},
    ]
    rows.append({"id": f"p{i}", "image": f"{i}.jpg", "conversations": turns})
  del rows[2]["image"]
  rows[2]["conversations"][0]["value"] = "What?"
  path = tmp_path / "train.json"
  path.write_text(json.dumps(rows, indent=2))
  return path, folder, rows


def run(data, *args):
  path, folder, _ = data
  return prepare.main(
    ["validate", f"--json={path}", f"--images={folder}", *args]
  )


def test_good_data_end_with_0_and_nothing_is_written(data, capsys):
  before = sorted(data[0].parent.rglob("*"))
  assert run(data) == 0
  out = capsys.readouterr().out
  assert "read 10 = used 10 + skipped 0 + failed 0" in out
  assert "0: 1, 1: 9" in out
  assert "No problem" in out
  assert sorted(data[0].parent.rglob("*")) == before


def test_a_mistake_is_named_with_its_line_and_ends_with_1(data, capsys):
  path, _, rows = data
  rows[4]["image"] = "five.jpg"
  path.write_text(json.dumps(rows, indent=2))
  line = 1 + path.read_text()[: path.read_text().index('"p4"')].count("\n")
  assert run(data) == 1
  out = capsys.readouterr().out
  # The entry begins a line before its id.
  assert f"train.json line {line - 1}, entry 5, id 'p4': image" in out
  assert "'five.jpg' is not in" in out
  assert "read 10 = used 9 + skipped 1 + failed 0" in out


def test_many_problems_are_counted_here_and_all_in_the_report(
  data, capsys, tmp_path
):
  path, _, rows = data
  rows = [
    row | {"id": f"[bold]{i}", "image": "x"} for i, row in enumerate(rows * 9)
  ]
  path.write_text(json.dumps(rows))
  report = tmp_path / "out.html"
  assert run(data, f"--report={report}") == 1
  out = capsys.readouterr().out
  assert out.count("train.json line 1, entry") == 20
  assert "id '[bold]0'" in out
  assert "70 more problems are not shown here" in out
  assert re.search(r"image_missing\s+│ skipped\s+│\s+90", out)
  assert report.read_text().count("train.json line 1, entry") == 90


def test_tokens_are_counted_with_a_tokenizer(data, capsys):
  assert run(data, f"--tokenizer={EMBEDDED_TOKENIZER.parent}") == 0
  out = capsys.readouterr().out
  longest = re.search(r"length in tokens .*longest ([\d,]+)", out)
  assert int(longest[1]) > 576
  run(data, f"--tokenizer={EMBEDDED_TOKENIZER}", "--image-tokens=10")
  out = capsys.readouterr().out
  fewer = re.search(r"length in tokens .*longest ([\d,]+)", out)
  assert int(longest[1]) - int(fewer[1]) == 566


def test_a_cut_image_is_found_unless_nothing_is_decoded(data, capsys):
  _, folder, _ = data
  image = folder / "7.jpg"
  image.write_bytes(image.read_bytes()[:-200])
  assert run(data, "--decode=none") == 0
  assert "images decoded" not in capsys.readouterr().out
  assert run(data, "--decode=2") == 0
  assert "2 files" in capsys.readouterr().out
  assert run(data) == 1
  assert "image_broken" in capsys.readouterr().out


@pytest.mark.parametrize(
  ("args", "words"),
  [
    (["--json=none.json"], "--json='none.json' is not there"),
    (["--images=none"], "--images='none' is no folder"),
    (["--report=none/out.html"], "--report="),
    (["--tokenizer=none"], "tokenizer"),
    (["--decode=some"], "wanted 'all', 'none' or a number"),
    (["--image-tokens=0"], "wanted a number from 1"),
    (["--imagse=x"], "unrecognized arguments"),
  ],
)
def test_wrong_usage_ends_with_2_and_says_what(data, capsys, args, words):
  try:
    code = run(data, *args)
  except SystemExit as error:  # Of argparse.
    code = error.code
  assert code == 2
  assert words in capsys.readouterr().err


def test_it_needs_no_jax(data):
  path, folder, _ = data
  code = (
    "import sys; from mole_jax import prepare; "
    f"code = prepare.main(['validate', '--json={path}', '--images={folder}'])"
    "; print(code, sorted({'jax', 'pyarrow'} & set(sys.modules)))"
  )
  done = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, check=True
  )
  assert done.stdout.splitlines()[-1] == "0 []"
