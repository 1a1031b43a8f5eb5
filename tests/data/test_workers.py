"""Jobs in other processes: their answers, and who is to blame."""

import pathlib
import subprocess
import sys
from typing import NamedTuple

import pytest

from mole_jax.data import workers

ROOT = pathlib.Path(__file__).parents[2]
PROGRAM = """
from mole_jax.data import workers

def do(job, report):
  print("a library says something")
  report(half=job["number"] / 2)
  if job["act"] == "error":
    raise ValueError("no such number")
  return 1 / (job["act"] != "crash")

workers.serve(do)
"""


class Job(NamedTuple):
  number: int
  act: str = ""

  def __str__(self):
    return f"job {self.number}"


@pytest.mark.parametrize("num_workers", [1, 3, 9])
def test_every_job_is_answered(num_workers):
  jobs = [Job(number) for number in range(5)]
  answers = list(workers.run(PROGRAM, jobs, num_workers))
  reported = [(job, x["half"]) for job, x in answers if "half" in x]
  assert sorted(reported) == [(job, job.number / 2) for job in jobs]
  assert sorted(job for job, x in answers if "known" in x) == jobs


def test_no_job_needs_no_answer():
  assert list(workers.run(PROGRAM, [], 2)) == []


@pytest.mark.parametrize(
  ("act", "message", "is_job_at_fault"),
  [("error", "^job 3: no such number$", True), ("crash", "Traceback", False)],
)
def test_an_error_names_the_job(act, message, is_job_at_fault):
  jobs = [Job(1), Job(2), Job(3, act), Job(4)]
  with pytest.raises(workers.WorkerError, match=message) as error:
    list(workers.run(PROGRAM, jobs, 2))
  assert str(error.value).startswith("job 3: ")
  assert isinstance(error.value, workers.JobError) == is_job_at_fault


def test_a_program_that_does_not_run_is_an_error():
  with pytest.raises(workers.WorkerError, match="exit code 1 at job 7"):
    list(workers.run("import no_such_module", [Job(7)], 1))


def test_the_cores_are_those_that_may_be_used():
  code = (
    "import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))]); "
    "from mole_jax.data import workers; print(workers.num_cores())"
  )
  done = subprocess.run(
    [sys.executable, "-c", code],
    cwd=ROOT,
    stdout=subprocess.PIPE,
    text=True,
    check=True,
  )
  assert done.stdout.strip() == "1"
