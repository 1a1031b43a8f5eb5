"""Counts of tokens: right, found again, and the same however they are made."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from mole_jax.data import conversation, measure, records, workers
from mole_jax.data.builders.prepared.build import build
from mole_jax.data.encoding import Encoder
from mole_jax.data.templates import VICUNA, RoleTemplate
from mole_jax.data.tokenizer import Tokenizer
from tests.data import killed_worker
from tests.data.builders import prepared_input

ROOT = pathlib.Path(__file__).parents[2]
NUM_RECORDS = 40
OPTIONS = {
  "format": "chat",
  "num_image_tokens": 3,
  "max_length": 40,
  "max_images": 1,
  "system": "",
  "use_bos": True,
  "template": VICUNA,
}


def make_entry(number):
  """Every fifth is too long in its question, every seventh has two images."""
  names = ["0.png"] * (2 if number % 7 == 6 else number % 2)
  made = prepared_input.entry(number)
  turn = made["conversations"][0]
  turn["value"] = "<image>\n" * len(names) + turn["value"]
  if number % 5 == 4:
    turn["value"] += "long " * 20
  return {**made, "domain": f"domain{number // 15}", "image": names}


@pytest.fixture
def folder(tmp_path):
  """A built data set of its own."""
  images = {"0.png": prepared_input.encode(np.zeros((8, 8, 3)))}
  entries = [make_entry(number) for number in range(NUM_RECORDS)]
  file, pictures = prepared_input.write(tmp_path, entries, images)
  build(file, pictures, name="toy", out=tmp_path / "out")
  return tmp_path / "out" / "toy" / "1.0.0"


@pytest.fixture
def make_encoder(toy_tokenizer):
  return lambda **changes: Encoder(toy_tokenizer, **{**OPTIONS, **changes})


def kept(folder):
  """What stands in a folder of counts, by folder and file name."""
  return prepared_input.contents(folder / "lengths")


def load(folder, encoder, **kwargs):
  return measure.load_or_measure(str(folder), "train", encoder, **kwargs)


def count_measurements(monkeypatch):
  calls = []

  def counting(*args):
    calls.append(args)
    return original(*args)

  original = measure.measure
  monkeypatch.setattr(measure, "measure", counting)
  return calls


def assert_same(one, other):
  np.testing.assert_array_equal(one.rows, other.rows)
  assert one.reasons == other.reasons
  assert one.domains == other.domains
  assert one.log.read_text() == other.log.read_text()


def test_counts_are_those_of_each_record_encoded(folder, make_encoder):
  encoder = make_encoder()
  measured = load(folder, encoder)
  assert len(measured.rows) == NUM_RECORDS
  assert measured.skipped() == {"no_supervision": 7, "too_many_images": 5}
  for row, record in zip(
    measured.rows, records.open_records(str(folder), "train"), strict=True
  ):
    assert measured.domains[row["domain"]] == record["domain"]
    reason = measured.reasons[row["reason"]]
    try:
      sample = encoder.encode(records.without_images(record))
    except conversation.SkippedSample as error:
      assert (reason, row["length"], row["images"]) == (error.reason, 0, 0)
      continue
    assert reason == ""
    assert row["length"] == len(sample.input_ids)
    assert row["answer_tokens"] == (sample.labels != -100).sum()
    assert row["images"] == sample.num_images


def test_every_skipped_record_is_named(folder, make_encoder):
  measured = load(folder, make_encoder())
  rows = records.open_records(str(folder), "train")
  lines = [json.loads(line) for line in measured.log.read_text().splitlines()]
  skipped = np.flatnonzero(measured.rows["reason"])
  assert [line["record"] for line in lines] == skipped.tolist()
  for line in lines:
    reason = measured.rows[line["record"]]["reason"]
    assert line["reason"] == measured.reasons[reason]
    assert line["id"] == rows[line["record"]]["id"]
  messages = {line["message"] for line in lines}
  assert "2 images; wanted at most 1." in messages


@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_processes_count_the_same_and_number_names_alike(
  folder, make_encoder, monkeypatch, tmp_path, num_workers
):
  alone = load(folder, make_encoder())
  (folder / "lengths").rename(tmp_path / "alone")
  alone = measure.Measured(
    alone.rows,
    alone.reasons,
    alone.domains,
    next((tmp_path / "alone").glob("*/skipped.jsonl")),
  )
  calls = count_measurements(monkeypatch)
  monkeypatch.setattr(measure, "_PER_JOB", 3)
  told = []
  there = load(
    folder,
    make_encoder(),
    report=lambda *counts: told.append(counts),
    num_workers=num_workers,
  )
  assert len(calls) == (num_workers == 1)  # Else done elsewhere.
  assert_same(there, alone)
  assert len(alone.reasons) == len(alone.domains) == 3
  assert told == sorted(told)
  assert told[-1] == (NUM_RECORDS, NUM_RECORDS)
  assert {name.split("/")[1] for name in kept(folder)} == {
    "about.json", "rows.npy", "skipped.jsonl",
  }  # fmt: skip


def test_what_was_measured_is_found_again(folder, make_encoder, monkeypatch):
  first = load(folder, make_encoder())
  before = kept(folder)
  calls = count_measurements(monkeypatch)
  # The format of its path does not matter, nor where it lies.
  moved = folder.parents[2] / "elsewhere"
  folder.parents[1].rename(moved)
  second = load(moved / "toy", make_encoder())
  assert not calls
  assert kept(moved / "toy" / "1.0.0") == before
  np.testing.assert_array_equal(first.rows, second.rows)


def test_another_encoder_is_measured_anew(folder, make_encoder, tmp_path):
  path = tmp_path / "tokenizer.json"
  source = make_encoder().tokenizer.path.read_text()
  # Reads "q" as it reads "Q".
  path.write_text(source.replace('"q":', '"~~":'))
  encoders = [
    make_encoder(),
    make_encoder(template=RoleTemplate(user="Q: ", assistant=" A:")),
    make_encoder(max_length=41),
    make_encoder(num_image_tokens=4),
    make_encoder(max_images=2),
    make_encoder(use_bos=False),
    make_encoder(system="Be brief."),
    Encoder(Tokenizer(path), **OPTIONS),
  ]
  for number, encoder in enumerate(encoders, 1):
    load(folder, encoder)
    assert len(list((folder / "lengths").iterdir())) == number
  copy = tmp_path / "copy.json"
  copy.write_text(source)  # The same tokenizer from another file.
  load(folder, Encoder(Tokenizer(copy), **OPTIONS))
  assert len(list((folder / "lengths").iterdir())) == len(encoders)


def test_counts_of_a_read_only_set_are_kept_in_the_users_cache(
  folder, make_encoder, monkeypatch, tmp_path
):
  access = os.access

  def read_only(path, mode):  # Whoever runs this may be root.
    is_set = pathlib.Path(path) == folder and mode == os.W_OK
    return not is_set and access(path, mode)

  monkeypatch.setattr(os, "access", read_only)
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  load(folder, make_encoder())
  assert not (folder / "lengths").exists()
  (found,) = (tmp_path / "cache" / "mole_jax" / "lengths").iterdir()
  assert (found / "about.json").is_file()
  calls = count_measurements(monkeypatch)
  assert load(folder, make_encoder()).log.parent == found
  assert not calls


def test_a_place_that_cannot_be_written_to_is_named(
  folder, make_encoder, monkeypatch
):
  (folder / "lengths").write_text("a file")
  with pytest.raises(ValueError, match=r"cannot be kept: .*XDG_CACHE_HOME"):
    load(folder, make_encoder())


def test_damaged_counts_are_named(folder, make_encoder):
  measured = load(folder, make_encoder())
  path = measured.log.with_name("rows.npy")
  path.write_bytes(path.read_bytes()[:-100])
  with pytest.raises(ValueError, match=f"{path.parent} is damaged"):
    load(folder, make_encoder())


# Arguments: the folder of the set, the tokenizer, what to do at a report.
PROGRAM = """
import os, signal, sys, time
from mole_jax.data import measure, templates, tokenizer
from mole_jax.data.encoding import Encoder
from tests.data import test_measure
folder, path, act = sys.argv[1:]
encoder = Encoder(tokenizer.Tokenizer(path), **test_measure.OPTIONS)
measure._PER_JOB = 3
def report(done, total):
  if act == "kill":
    print("reported", flush=True)
    time.sleep(60)
print("begun", flush=True)
sys.stdin.readline()
test_measure.load(folder, encoder, report=report, num_workers=2)
"""


def start(folder, encoder, act):
  process = subprocess.Popen(
    [sys.executable, "-c", PROGRAM, folder, encoder.tokenizer.path, act],
    cwd=ROOT,
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
    start_new_session=True,
  )
  return process


def session(number):
  """Processes of a session that have not ended."""
  found = []
  for path in pathlib.Path("/proc").glob("[0-9]*/stat"):
    try:
      state, _, _, its_session = path.read_text().rsplit(")")[1].split()[:4]
    except OSError:  # It has ended.
      continue
    if int(its_session) == number and state != "Z":
      found.append(path.parent.name)
  return found


@pytest.mark.parametrize("is_group", [True, False])
def test_a_kill_while_measuring_leaves_nothing_half(
  folder, make_encoder, monkeypatch, is_group
):
  process = start(folder, make_encoder(), "kill")
  process.stdin.write("\n")
  process.stdin.flush()
  assert [process.stdout.readline() for _ in range(2)][1] == "reported\n"
  assert len(session(process.pid)) == 3
  (os.killpg if is_group else os.kill)(process.pid, signal.SIGKILL)
  process.communicate()
  deadline = time.monotonic() + 5
  while session(process.pid) and time.monotonic() < deadline:
    time.sleep(0.05)
  assert not session(process.pid)
  (left,) = (folder / "lengths").iterdir()
  assert left.name.startswith(".partial-")
  calls = count_measurements(monkeypatch)
  long_ago = time.time() - 2 * measure._LEFT_SECONDS
  os.utime(left, (long_ago, long_ago))
  load(folder, make_encoder(), num_workers=1)
  assert len(calls) == 1
  (whole,) = (folder / "lengths").iterdir()
  assert not whole.name.startswith(".partial-")


def test_what_another_process_is_measuring_is_not_removed(folder, make_encoder):
  process = start(folder, make_encoder(), "kill")
  try:
    process.stdin.write("\n")
    process.stdin.flush()
    process.stdout.readline()
    process.stdout.readline()
    (partial,) = (folder / "lengths").iterdir()
    os.utime(partial, (0, 0))
    load(folder, make_encoder())
    assert partial.exists()
  finally:
    process.kill()
    process.communicate()


def test_two_processes_may_measure_at_once(folder, make_encoder, monkeypatch):
  processes = [start(folder, make_encoder(), "") for _ in range(2)]
  for process in processes:
    assert process.stdout.readline() == "begun\n"
  for process in processes:
    process.stdin.write("\n")
    process.stdin.flush()
  for process in processes:
    process.communicate(timeout=60)
    assert process.returncode == 0
  (found,) = (folder / "lengths").iterdir()
  calls = count_measurements(monkeypatch)
  measured = load(folder, make_encoder())
  assert not calls and measured.log.parent == found
  assert measured.skipped() == {"no_supervision": 7, "too_many_images": 5}


def test_a_damaged_text_file_is_named_by_whoever_reads_it(
  folder, make_encoder, monkeypatch
):
  (path,) = folder.glob("train-text-*")
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 0xFF
  path.write_bytes(data)
  for per_job in (measure._PER_JOB, 3):
    monkeypatch.setattr(measure, "_PER_JOB", per_job)
    with pytest.raises(ValueError, match=f"{path} cannot be read"):
      load(folder, make_encoder(), num_workers=2)
  assert not list((folder / "lengths").iterdir())


def test_a_killed_worker_is_named(folder, make_encoder, monkeypatch):
  killed_worker.kill_at(monkeypatch, lambda job: job.start == 6)
  monkeypatch.setattr(measure, "_PER_JOB", 3)
  with pytest.raises(workers.WorkerError) as error:
    load(folder, make_encoder(), num_workers=2)
  assert "killed by SIGKILL" in str(error.value)
  assert "counting tokens of records 6 to 9" in str(error.value)


def test_a_worker_imports_no_jax():
  code = (
    "import sys; from mole_jax.data import measure; "
    "print(sorted({'jax', 'torch', 'tensorflow'} & set(sys.modules)))"
  )
  done = subprocess.run(
    [sys.executable, "-c", code],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=True,
  )
  assert done.stdout.strip() == "[]"
