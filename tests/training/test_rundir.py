"""One config and one writer for a run directory."""

import subprocess
import sys

import pytest

from mole_jax.training import rundir
from tests.training import small_run

CONFIG = {
  "seed": 0,
  "model": {"rank": 4},
  "log_every": 10,
  "stages": {"mole": {}},
}


def test_another_config_is_refused_with_the_differences(tmp_path):
  rundir.claim(tmp_path, CONFIG)
  small_run.leave_a_checkpoint(tmp_path, "mole")
  rundir.claim(tmp_path, CONFIG | {"log_every": 1})  # Changes no result.
  other = CONFIG | {"seed": 1, "model": {"rank": 8, "alpha": 2}}
  with pytest.raises(ValueError) as error:
    rundir.claim(tmp_path, other)
  lines = str(error.value).splitlines()[1:]
  assert [line.strip() for line in lines] == [
    "model.alpha: new",
    "model.rank: 4 -> 8",
    "seed: 0 -> 1",
  ]


def test_a_run_that_ended_before_a_checkpoint_takes_another_config(tmp_path):
  rundir.claim(tmp_path, CONFIG)
  rundir.claim(tmp_path, CONFIG | {"seed": 1})
  (tmp_path / "mole").mkdir()
  (tmp_path / "mole" / "base.json").touch()  # A stage that ends in a base.
  with pytest.raises(ValueError, match="seed: 1 -> 0"):
    rundir.claim(tmp_path, CONFIG)


def test_a_second_writer_is_refused_and_a_dead_one_forgotten(tmp_path):
  code = (
    "import sys, pathlib\n"
    "from mole_jax.training import rundir\n"
    "lock = rundir.Lock(pathlib.Path(sys.argv[1])).__enter__()\n"
    "print('held', flush=True)\n"
    "sys.stdin.read()\n"
  )
  holder = subprocess.Popen(
    [sys.executable, "-c", code, str(tmp_path)],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  )
  assert holder.stdout.readline().strip() == "held"
  with (
    pytest.raises(rundir.LockedError, match=f"process {holder.pid}"),
    rundir.Lock(tmp_path),
  ):
    pass
  holder.kill()
  holder.communicate()
  with rundir.Lock(tmp_path):
    pass


def test_a_run_of_an_older_version_says_what_to_add(tmp_path):
  config = {"data": {"template": "vicuna"}}
  with pytest.raises(ValueError, match='"image_resample": "bicubic"') as error:
    rundir.check_age(tmp_path, config)
  assert str(tmp_path / "config.json") in str(error.value)
  config["data"]["image_resample"] = "bicubic"
  rundir.check_age(tmp_path, config)


def test_a_run_of_before_a_setting_goes_on_with_what_it_did(tmp_path):
  stage = lambda **more: {"stages": {"mole": {"num_steps": 1, **more}}}
  rundir.claim(tmp_path, stage())
  small_run.leave_a_checkpoint(tmp_path, "mole")
  rundir.claim(tmp_path, stage(quantize="none"))
  (tmp_path / "config.json").unlink()
  rundir.claim(tmp_path, stage())
  with pytest.raises(ValueError, match="mole.quantize: new"):
    rundir.claim(tmp_path, stage(quantize="int8"))
