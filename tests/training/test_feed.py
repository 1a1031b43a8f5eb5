"""Nothing is lost in silence: records, the data themselves, and time."""

import json

import numpy as np
import pytest

from mole_jax.data import mixture, records
from mole_jax.data.tokenizer import Tokenizer
from mole_jax.training import checkpoint, feed, files, rundir
from tests.training import small_run

BAD = "general8"


@pytest.fixture(scope="module")
def text(tmp_path_factory):
  return small_run.make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def make_config(**changes):
  config = small_run.make_config()
  config["data"] |= {"max_skipped": 0.5, **changes}
  # Two lines of one data set: one has captions, one is without.
  lines = config["stages"]["base"]["mixture"]
  config["stages"]["base"]["mixture"] = {
    key: lines[key] for key in ("general_captions", "general")
  }
  return config


def read_lines(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def test_records_add_up_in_the_metrics(text, tmp_path, monkeypatch):
  make_records = small_run.make_records

  def without_caption(domain):
    made = make_records(domain)
    made[5]["caption"] = ""
    return made

  monkeypatch.setattr(small_run, "make_records", without_caption)
  small_run.train(make_config(), "base", tmp_path, text, bad=[BAD])
  rows = read_lines(tmp_path / "base" / "metrics.jsonl")
  assert [row["step"] for row in rows] == [2, 4, 6]
  for row in rows:
    assert set(row["records"]) == {"general_captions", "general"}
    for account in row["records"].values():
      skipped = sum(account["skipped"].values())
      assert account["read"] == 12
      assert account["read"] == account["used"] + skipped + account["failed"]
  last = rows[-1]["records"]
  assert last["general_captions"]["skipped"] == {"no_caption": 1}
  assert last["general"] == {"read": 12, "used": 11, "skipped": {}, "failed": 1}
  # It is counted once there, here as often as it was drawn.
  loader = small_run.make_loader(make_config(), "base", text, [BAD])
  drawn = sum(int(batch["num_failed"]) for batch in loader)
  assert sum(row["num_failed"] for row in rows) == drawn > 2


def test_a_failed_record_is_named_once_even_after_a_resume(text, tmp_path):
  config = make_config()
  args = (config, "base", tmp_path, text)
  small_run.train(*args, bad=[BAD], last_step=3)  # It comes in step 4 too.
  path = tmp_path / "base" / "failed.jsonl"
  first = read_lines(path)
  small_run.train(*args, bad=[BAD])
  assert read_lines(path) == first
  assert sorted((line["dataset"], line["record"]) for line in first) == [
    ("embedded/general as chat", 8),
    ("embedded/general as plain", 8),
  ]
  assert "cannot decode image (40 bytes)" in first[0]["message"]


def test_half_a_line_of_a_killed_run_is_dropped(text, tmp_path):
  config = make_config()
  loader = small_run.make_loader(config, "base", text, [BAD])
  list(loader)
  path = tmp_path / "failed.jsonl"
  feed.FailureLog(tmp_path).write(loader)
  whole = path.read_text()
  path.write_text(whole[:-20])
  feed.FailureLog(tmp_path).write(loader)
  lines = path.read_text().splitlines()
  assert lines == whole.splitlines()


def test_too_many_failures_stop_training_with_the_state_saved(text, tmp_path):
  config = make_config(max_skipped=0.01)
  with pytest.raises(mixture.TooManySkipped, match=r"1 of 12 .*'failed': 1"):
    small_run.train(config, "base", tmp_path, text, bad=[BAD])
  assert checkpoint.list_steps(tmp_path, "base") == [3]
  assert len(read_lines(tmp_path / "base" / "failed.jsonl")) == 2
  # As the message says, a higher limit goes on.
  config["data"]["max_skipped"] = 0.1
  small_run.train(config, "base", tmp_path, text, bad=[BAD])
  assert checkpoint.list_steps(tmp_path, "base")[-1] == 6


def test_the_share_of_waiting_is_a_share(text, tmp_path):
  _, rows = small_run.train(make_config(), "base", tmp_path, text)
  for row in rows.values():
    assert 0 <= row["stall_share"] <= 1


def test_other_data_are_refused_or_written_down(tmp_path):
  config, tokenizer = small_run.make_config(), Tokenizer()
  stage = tmp_path / "base"
  stage.mkdir()
  known = feed.describe(config, "base", tokenizer)
  assert known["data"]["general"] == records.identity(
    "embedded/general", "train"
  )
  check = lambda found, step, accepted=False: feed.check_unchanged(
    stage, found, step, is_change_accepted=accepted
  )
  check(known, 0)
  check(known, 4)
  other = {**known, "tokenizer": "x", "data": {**known["data"], "general": "y"}}
  with pytest.raises(ValueError) as error:
    check(other, 4)
  message = str(error.value)
  assert "first 4 steps" in message and "--accept_data_change" in message
  assert f"\n  data.general: '{known['data']['general']}' -> 'y'\n" in message
  assert f"\n  tokenizer: '{known['tokenizer']}' -> 'x'\n" in message
  assert files.read_json(stage / "data.json") == known
  assert not (tmp_path / "data_changes.jsonl").exists()
  check(other, 4, accepted=True)
  assert files.read_json(stage / "data.json") == other
  (change,) = read_lines(tmp_path / "data_changes.jsonl")
  assert (change["stage"], change["after_step"]) == ("base", 4)
  assert len(change["changes"]) == 2
  check(other, 6)  # They are the ones that are trained on now.
  with pytest.raises(ValueError, match="'y' -> "):
    check(known, 6)


def test_data_of_a_stage_without_a_step_may_change(tmp_path):
  check = lambda found: feed.check_unchanged(
    tmp_path, found, 0, is_change_accepted=False
  )
  check({"tokenizer": "x"})
  check({"tokenizer": "y"})
  assert files.read_json(tmp_path / "data.json") == {"tokenizer": "y"}


def test_what_decides_the_batches_tells_data_apart():
  config, tokenizer = small_run.make_config(), Tokenizer()
  known = feed.describe(config, "base", tokenizer)
  config["stages"]["base"]["mixture"]["general"]["split"] = "validation"
  other = feed.describe(config, "base", tokenizer)
  assert rundir.differences(known, other) == [
    f"data.general: {known['data']['general']!r} -> "
    f"{other['data']['general']!r}"
  ]


def test_other_weights_are_refused_or_written_down(text, tmp_path):
  config = make_config()
  rundir.claim(tmp_path, config)
  small_run.train(config, "base", tmp_path, text, last_step=3)
  changed = make_config()
  changed["stages"]["base"]["mixture"]["general"]["weight"] = 3.0
  with pytest.raises(ValueError) as error:
    rundir.claim(tmp_path, changed)
  line = "stages.base.mixture.general.weight: 1.0 -> 3.0"
  assert f"\n  {line}\n" in str(error.value)
  assert "--accept_data_change" in str(error.value)
  rundir.claim(tmp_path, config)  # Nothing was written.
  rundir.claim(tmp_path, changed, is_data_change_accepted=True)
  (change,) = read_lines(tmp_path / "data_changes.jsonl")
  assert (change["stage"], change["after_step"]) == ("base", 3)
  assert change["changes"] == [line]
  before, _ = small_run.train(config, "base", tmp_path / "other", text)
  after, rows = small_run.train(changed, "base", tmp_path, text)
  assert min(rows) == 4  # It goes on where it was.
  assert any(np.any(before[name] != after[name]) for name in before)


def test_a_change_beside_the_data_is_never_accepted(tmp_path):
  config = make_config()
  rundir.claim(tmp_path, config)
  small_run.leave_a_checkpoint(tmp_path, "base")
  changed = make_config()
  changed["seed"] = 1
  changed["stages"]["base"]["mixture"]["general"]["weight"] = 3.0
  with pytest.raises(ValueError, match="seed: 0 -> 1") as error:
    rundir.claim(tmp_path, changed, is_data_change_accepted=True)
  assert "--accept_data_change" not in str(error.value)
