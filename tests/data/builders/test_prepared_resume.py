import contextlib
import fcntl
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest

from mole_jax.data import workers
from mole_jax.data.builders.prepared import build as build_lib
from mole_jax.data.builders.prepared import shards, spool
from mole_jax.data.builders.prepared.build import build
from tests.data import killed_worker
from tests.data.builders.prepared_input import (
  contents,
  encode,
  entry,
  sample_input,
  write,
)

ROOT = pathlib.Path(__file__).parents[3]
COUNT, SHARDS = 3000, 12


@pytest.fixture(scope="module")
def large(tmp_path_factory):
  """Records that take a second or two, and what they are built into."""
  folder = tmp_path_factory.mktemp("large")
  entries = [entry(i, f"{i % 5}.png") for i in range(COUNT)]
  images = {f"{i}.png": encode([[[i, 0, 0]] * 60] * 60) for i in range(5)}
  file, pictures = write(folder, entries, images)
  build(file, pictures, name="toy", out=folder / "whole", num_shards=SHARDS)
  return file, pictures, contents(folder / "whole")


def start(file, pictures, out, before="", workers=2):
  """A build in a process group of its own."""
  program = (
    f"{before}\n"
    "from mole_jax.data.builders.prepared.build import build\n"
    f"build({str(file)!r}, {str(pictures)!r}, name='toy', out={str(out)!r},"
    f" num_shards={SHARDS}, num_workers={workers})"
  )
  return subprocess.Popen(
    [sys.executable, "-c", program],
    cwd=ROOT,
    start_new_session=True,
    stderr=subprocess.PIPE,
    text=True,
  )


def partial_of(out):
  return out / "toy" / "1.0.0.partial"


def finished(out):
  """Inode and time of each finished shard that a build has left."""
  partial = partial_of(out)
  names = {
    path.name.removesuffix(".json").removeprefix("shard-")
    for path in partial.glob("work/shard-*.json")
  }
  files = (partial / "data").glob("*.array_record-*-of-?????")
  return {
    path.name: (path.stat().st_ino, path.stat().st_mtime_ns)
    for path in files
    if path.name.split("-")[-3] in names
  }


def wait_until(condition, seconds=30):
  deadline = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < deadline, "waited in vain"
    time.sleep(0.01)


def group(number):
  """The processes of a group that are not yet gone."""
  found = []
  for path in pathlib.Path("/proc").glob("[0-9]*/stat"):
    with contextlib.suppress(OSError):
      state, _, owner = path.read_text().rpartition(")")[2].split()[:3]
      if int(owner) == number and state != "Z":
        found.append(int(path.parent.name))
  return found


def test_kills_of_the_whole_group_at_any_moment_change_no_byte(tmp_path, large):
  file, pictures, whole = large
  rng = random.Random(1)
  kept, groups = [], []
  for _ in range(6):
    process = start(file, pictures, tmp_path)
    groups.append(process.pid)
    wait_until(partial_of(tmp_path).exists)
    if kept:  # The first comes at once, so that there is one for sure.
      time.sleep(rng.uniform(0.3, 2.0))
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    if (tmp_path / "toy" / "1.0.0").exists():
      break
    kept.append(len(finished(tmp_path)))
  assert kept and kept == sorted(kept)
  wait_until(lambda: not any(map(group, groups)), seconds=5)
  build(file, pictures, name="toy", out=tmp_path, num_shards=SHARDS)
  assert contents(tmp_path) == whole


@pytest.mark.parametrize("num_finished", [0, 1, 5, SHARDS - 1])
def test_finished_shards_are_kept_and_the_rest_is_redone(
  tmp_path, large, num_finished
):
  file, pictures, whole = large
  process = start(file, pictures, tmp_path, workers=1)
  plan = partial_of(tmp_path) / "work" / spool.PLAN
  wait_until(lambda: plan.exists() and len(finished(tmp_path)) >= num_finished)
  os.killpg(process.pid, signal.SIGKILL)
  process.communicate()
  before = finished(tmp_path)
  assert num_finished <= len(before) <= SHARDS
  read = []
  build(
    file, pictures, name="toy", out=tmp_path, num_shards=SHARDS,
    report=lambda phase, *_: read.append(phase == "reading"),
  )  # fmt: skip
  assert contents(tmp_path) == whole
  assert not any(read)  # The plan was there.
  folder = tmp_path / "toy" / "1.0.0"
  for name, (inode, changed) in before.items():
    status = (folder / name).stat()
    assert (status.st_ino, status.st_mtime_ns) == (inode, changed)


def test_workers_end_with_a_killed_parent_and_the_next_build_may_begin(
  tmp_path, large
):
  file, pictures, whole = large
  process = start(file, pictures, tmp_path)
  wait_until(lambda: finished(tmp_path))
  assert len(group(process.pid)) == 3
  os.kill(process.pid, signal.SIGKILL)
  process.wait()
  build(file, pictures, name="toy", out=tmp_path, num_shards=SHARDS)
  wait_until(lambda: not group(process.pid), seconds=5)
  process.communicate()
  assert contents(tmp_path) == whole


def test_a_killed_worker_is_named_and_nothing_finished_is_lost(
  tmp_path, large, monkeypatch
):
  file, pictures, whole = large
  with monkeypatch.context() as patch:
    killed_worker.kill_at(patch, lambda job: job.shard == 4)
    with pytest.raises(workers.WorkerError) as caught:
      build(
        file, pictures, name="toy", out=tmp_path, num_shards=SHARDS,
        num_workers=2,
      )  # fmt: skip
  message = str(caught.value)
  assert "killed by SIGKILL" in message
  assert "at shard 4" in message
  assert "run the same command again" in message
  before = finished(tmp_path)
  assert len(before) >= 3
  build(file, pictures, name="toy", out=tmp_path, num_shards=SHARDS)
  assert contents(tmp_path) == whole


@pytest.mark.parametrize("limit", [2**10, 2**18])
def test_a_full_disk_says_so_and_the_same_command_goes_on(
  tmp_path, large, limit
):
  """A limit on the size of a file stands for it: of the spool, of a shard."""
  file, pictures, whole = large
  # Shards hold the images, so they outgrow the spool; or nothing fits.
  before = (
    "import resource\n"
    f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))"
  )
  if limit > 2**10:
    # The plan is there already: only shards are left to write.
    process = start(file, pictures, tmp_path)
    wait_until(lambda: (partial_of(tmp_path) / "work" / spool.PLAN).exists())
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    before = before.replace(str(limit), str(2**12))
  process = start(file, pictures, tmp_path, before)
  _, error = process.communicate()
  assert process.returncode == 1
  assert "File too large" in error
  assert "run the same command again" in error.replace("\n", " ")
  assert not (tmp_path / "toy" / "1.0.0").exists()
  build(file, pictures, name="toy", out=tmp_path, num_shards=SHARDS)
  assert contents(tmp_path) == whole


def begun(tmp_path, count=12):
  """A build of which one shard was written, and what it was given."""
  file, pictures, _ = sample_input(tmp_path, count)
  options = {"name": "toy", "out": tmp_path / "out", "num_shards": 2}
  with pytest.raises(KeyboardInterrupt):
    build(file, pictures, **options, report=_interrupt)
  assert len(finished(tmp_path / "out")) == 1
  return file, pictures, options


def _interrupt(phase, done, total):
  if phase == "writing" and done >= total // 2:  # One shard of two is there.
    raise KeyboardInterrupt


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"max_image_side": 4}, "max_image_side: 1024 -> 4"),
    ({"domain": "other"}, "domain: 'toy' -> 'other'"),
    ({"num_shards": 3}, "shards: 2 -> 3"),
    ({"seed": 1}, "seed: 0 -> 1"),
  ],
)
def test_another_option_is_refused_with_the_way_out(tmp_path, change, message):
  file, pictures, options = begun(tmp_path)
  for _ in range(2):  # Of what is begun, then of what is built.
    with pytest.raises(ValueError, match=message) as caught:
      build(file, pictures, **{**options, **change})
    assert "to build anew" in str(caught.value)
    build(file, pictures, **options)


def test_another_input_is_refused_by_its_hash(tmp_path):
  file, pictures, options = begun(tmp_path)
  text = file.read_text()
  file.write_text(text.replace("qq", "xx"))  # Of the same length.
  for _ in range(2):
    with pytest.raises(ValueError, match="file_sha256"):
      build(file, pictures, **options)
    file.write_text(text)
    build(file, pictures, **options)
    file.write_text(text.replace("qq", "xx"))


def test_an_image_that_changed_under_a_finished_shard_is_named(tmp_path):
  file, pictures, options = begun(tmp_path)
  done = next((partial_of(tmp_path / "out") / "work").glob("shard-*.json"))
  job = shards.Job(
    str(done.parent), "", file.name, "toy", int(done.stem[6:]), 1024
  )
  samples = spool.shuffled(done.parent, job.plan().span(job.shard))
  path = next(image.path for sample in samples for image in sample.images)
  path.write_bytes(encode([[[1, 2, 3]] * 9] * 9))
  with pytest.raises(workers.WorkerError, match=f"{path} has changed"):
    build(file, pictures, **options)


def test_the_limit_of_skipped_records_may_change(tmp_path):
  file, pictures, options = begun(tmp_path)
  build(file, pictures, **options, max_skipped=0.5, num_workers=2)


def test_what_is_built_is_not_built_again(tmp_path):
  file, pictures, _ = sample_input(tmp_path)
  first = build(file, pictures, name="toy", out=tmp_path / "out")
  before = (tmp_path / "out" / "toy" / "1.0.0" / "prepared.json").stat()
  left = partial_of(tmp_path / "out")  # As a kill at the very end leaves it.
  left.mkdir()
  assert build(file, pictures, name="toy", out=tmp_path / "out") == first
  after = (tmp_path / "out" / "toy" / "1.0.0" / "prepared.json").stat()
  assert (before.st_ino, before.st_mtime_ns) == (
    after.st_ino,
    after.st_mtime_ns,
  )
  assert not left.exists()


def test_a_folder_that_is_no_data_set_is_not_overwritten(tmp_path):
  file, pictures, _ = sample_input(tmp_path)
  folder = tmp_path / "out" / "toy" / "1.0.0"
  folder.mkdir(parents=True)
  (folder / "thesis.tex").write_text("x")
  with pytest.raises(ValueError, match="was not built by this command"):
    build(file, pictures, name="toy", out=tmp_path / "out")
  assert (folder / "thesis.tex").exists()


def test_a_second_build_of_the_same_set_is_refused(tmp_path, monkeypatch):
  monkeypatch.setattr(build_lib, "_LOCK_SECONDS", 0.2)
  file, pictures, _ = sample_input(tmp_path)
  partial = partial_of(tmp_path / "out")
  partial.mkdir(parents=True)
  with (partial / "lock").open("w") as held:
    held.write("4711")
    held.flush()
    fcntl.flock(held, fcntl.LOCK_EX)
    with pytest.raises(BlockingIOError, match="being built by process 4711"):
      build(file, pictures, name="toy", out=tmp_path / "out")
  build(file, pictures, name="toy", out=tmp_path / "out")


def test_a_shard_cut_short_by_a_crash_of_the_machine_is_redone(tmp_path):
  file, pictures, options = begun(tmp_path)
  partial = partial_of(tmp_path / "out")
  (name,) = finished(tmp_path / "out")
  with (partial / "data" / name).open("r+b") as shard:
    shard.truncate(1000)
  build(file, pictures, **options)
  other = tmp_path / "other"
  build(file, pictures, **{**options, "out": other})
  assert contents(tmp_path / "out") == contents(other)


def test_the_plan_does_not_depend_on_where_the_build_ended(tmp_path):
  """A spool cut by a kill is written anew, not appended to."""
  file, pictures, options = begun(tmp_path)
  partial = partial_of(tmp_path / "out")
  shutil.rmtree(partial / "data")
  for path in (partial / "work").glob("shard-*"):
    path.unlink()
  (partial / "work" / spool.PLAN).unlink()
  with (partial / "work" / spool.SPOOL).open("ab") as cut:
    cut.write(b"half a record")
  about = build(file, pictures, **options)
  assert about["used"] == 12
  info = tmp_path / "out" / "toy" / "1.0.0" / "dataset_info.json"
  split = json.loads(info.read_text())["splits"][0]
  assert split["shardLengths"] == ["6", "6"]
