"""The README's launch commands print what they would run, and run nothing."""

import shlex

import pytest

from launch import gke, tpu
from tests import test_readme
from tests.launch import fakes

LAUNCH = [
  line for line in test_readme.COMMANDS if line.startswith("python -m launch.")
]


def test_there_are_some():
  assert len(LAUNCH) >= 6


@pytest.mark.parametrize("line", LAUNCH)
def test_a_command_works_without_touching_anything(
  line, tmp_path, monkeypatch, capsys
):
  fake = fakes.Gcloud(tmp_path / "fake")
  fake.play()
  monkeypatch.setenv("PATH", fakes.path_with(fake.path))
  monkeypatch.chdir(tmp_path)
  module, *argv = shlex.split(line)[2:]
  if module == "launch.tpu" and argv[0] != "types":
    assert "--dry-run" in argv
  main = {"launch.tpu": tpu.main, "launch.gke": gke.main}[module]
  assert main(argv) == 0
  assert capsys.readouterr().out
  assert fake.calls == []
