"""The command as a user types it."""

import json
import pathlib
import re
import runpy
import subprocess
import sys

import pytest
from PIL import Image

from mole_jax import prepare
from mole_jax.data.tokenizer import EMBEDDED_TOKENIZER

# ml_collections loads config files in a way that Python 3.12 still has.
LOAD_MODULE = "ignore:the load_module:DeprecationWarning"
CONFIGS = pathlib.Path(__file__).parents[1] / "configs"


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


def test_both_commands_skip_the_same_and_name_it(data, capsys, tmp_path):
  """What one of them lets pass, the other must not stop at."""
  path, folder, rows = data
  picture = (folder / "0.jpg").read_bytes()
  (folder / "cut.jpg").write_bytes(picture[: len(picture) // 2])
  (folder / "empty.jpg").write_bytes(b"")
  (folder / "page.jpg").write_text("<html>404 Not Found")
  (folder / "flipped.jpg").write_bytes(b"\xff\xd7" + picture[2:])
  (folder / "folder.jpg").mkdir()
  (folder / "out.jpg").symlink_to("/etc/passwd")
  (folder / "nowhere.jpg").symlink_to("gone.jpg")
  names = [path.name for path in sorted(folder.iterdir())][10:]
  names += ["gone.jpg", "../pictures/0.jpg", "/etc/passwd", "a\0.jpg"]
  assert len(names) == 11
  bad = [rows[0] | {"id": name, "image": name} for name in names]
  turns = rows[0]["conversations"]
  mute = {"from": "gpt", "value": ""}
  bad += [
    rows[0] | {"id": "two", "conversations": [turns[0], *turns]},
    rows[0] | {"id": "mute", "conversations": [turns[0], mute]},
    rows[0] | {"id": "role", "conversations": [turns[0] | {"from": "cat"}]},
    rows[0],
  ]  # fmt: skip
  rows = rows + bad
  path.write_text("[" + ",\n".join(map(json.dumps, rows)) + "]")
  assert run(data) == 1
  told = capsys.readouterr().out.splitlines()
  told = sorted(line for line in told if line.startswith("train.json line"))
  assert [
    int(re.match(r"train.json line (\d+)", line)[1]) for line in told
  ] == [*range(11, 26)]
  command = ["build", f"--json={path}", f"--images={folder}", "--name=toy"]
  command += [f"--out={tmp_path / 'out'}", "--max-skipped=0.6"]
  assert prepare.main(command) == 0
  assert "read 25 = used 10 + skipped 15 + failed 0" in capsys.readouterr().out
  log = tmp_path / "out" / "toy" / "1.0.0" / "skipped.jsonl"
  logged = [json.loads(line) for line in log.read_text().splitlines()]
  assert [row["message"] for row in logged] == told
  assert [row["id"] for row in logged] == [row["id"] for row in bad]


def test_a_file_that_cannot_be_read_on_stops_a_build_with_1(data, capsys):
  path, folder, _ = data
  path.write_text(path.read_text().replace("]\n  },", "],\n  },", 1))
  command = ["build", f"--json={path}", f"--images={folder}", "--name=toy"]
  assert prepare.main([*command, f"--out={path.parent / 'out'}"]) == 1
  message = capsys.readouterr().err
  assert "remove the comma before the }" in message
  assert "Traceback" not in message


def test_a_build_that_stops_names_the_first_bad_records(data, capsys):
  path, folder, _ = data
  for i in (3, 4, 5, 6):
    (folder / f"{i}.jpg").unlink()
  command = ["build", f"--json={path}", f"--images={folder}", "--name=toy"]
  assert prepare.main([*command, f"--out={path.parent / 'out'}"]) == 1
  first, *rest = capsys.readouterr().err.splitlines()
  assert "4 of 10 records are bad (40.00%)" in first
  assert "image_missing 4" in first
  assert [line.split(":")[0].split("id ")[1] for line in rest] == [
    "'p3'",
    "'p4'",
    "'p5'",
  ]


@pytest.fixture
def built(data, tmp_path, monkeypatch):
  """A data set that is named as the README names it."""
  monkeypatch.chdir(tmp_path)
  path, folder, _ = data
  assert (
    prepare.main(
      ["build", f"--json={path}", f"--images={folder}", "--name=mine"]
      + ["--out=data", "--workers=1"]
    )
    == 0
  )
  return "data/mine"


@pytest.mark.filterwarnings(LOAD_MODULE)
def test_mixture_shows_a_config_of_your_own(built, capsys):
  assert prepare.main(["mixture", f"--config={CONFIGS}/own.py:{built}"]) == 0
  out = capsys.readouterr().out
  assert "stage base, by data set" in out
  assert "stage mole, by domain" in out
  (line,) = [line for line in out.splitlines() if "set0_mine" in line]
  # Ten records, nine pictures: all that the stage sees.
  assert line.split()[1:5] == ["100.0%"] * 4
  assert line.split()[5:7] == ["10", "10"]
  assert "20 steps" in out and "padding" in out


@pytest.mark.filterwarnings(LOAD_MODULE)
def test_mixture_counts_for_changed_settings(capsys):
  args = ["mixture", f"--config={CONFIGS}/mole3.py"]
  change = "--config.stages.mole.mixture.general.weight=2.0"
  assert prepare.main([*args, change]) == 0
  general, document = (
    re.search(rf"stage mole.*? {name} +([\d.]+)%", out, re.DOTALL)[1]
    for out in [capsys.readouterr().out]
    for name in ("general", "document")
  )
  assert (float(general), float(document)) == (50.0, 25.0)


@pytest.mark.parametrize(
  ("args", "message"),
  [
    ([], "--config=FILE"),
    (["--config={configs}/mole3.py", "--config.sed=1"], "no setting 'sed'"),
    (["--config={configs}/mole3.py", "more"], "unexpected argument 'more'"),
    (["--config={configs}/own.py"], "which data?"),
    (["--config={configs}/own.py:nothing"], "'nothing' holds no data set"),
    (["--config={configs}/nothing.py"], "nothing.py"),
  ],
)
@pytest.mark.filterwarnings(LOAD_MODULE)
def test_mixture_explains_a_wrong_command(args, message, capsys):
  args = [arg.format(configs=CONFIGS) for arg in args]
  assert prepare.main(["mixture", *args]) == 2
  assert message in capsys.readouterr().err


def test_several_sets_mix_as_often_as_they_have_records(built):
  config = runpy.run_path(str(CONFIGS / "own.py"))["get_config"]
  lines = config(f"{built},{built}/1.0.0").stages.mole.mixture
  assert [line.weight for line in lines.values()] == [10, 10]
  assert config(built).data.domains[0] == "mine"
  with pytest.raises(ValueError, match="or a directory with a base"):
    config(f"{built}@nothing")
