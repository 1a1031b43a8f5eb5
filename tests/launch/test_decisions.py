"""What is done in each state: a table written by hand, and its properties."""

import itertools

import pytest

from launch import decisions
from launch.decisions import Do, Limits, Report, Sight, decide

LIMITS = Limits(install=100, unreachable=100, settle=100)


def see(*states, queue="ACTIVE", hosts=None, seconds=0.0, **more):
  reports = tuple(
    Report(f"w-{i}", *state.split(" ", 1)) for i, state in enumerate(states)
  )
  return Sight(
    queue,
    reports=reports,
    num_hosts=len(reports) if hosts is None else hosts,
    seconds_unlike=seconds,
    **more,
  )


QUEUE = {
  "MISSING": Do.CREATE,
  "CREATING": Do.WAIT,
  "ACCEPTED": Do.WAIT,
  "WAITING_FOR_RESOURCES": Do.WAIT,
  "PROVISIONING": Do.WAIT,
  "SUSPENDING": Do.WAIT,
  "DELETING": Do.WAIT,
  "STATE_UNSPECIFIED": Do.WAIT,
  "SOMETHING_NEW": Do.WAIT,
  "SUSPENDED": Do.DELETE,
  "FAILED": Do.DELETE,
}


@pytest.mark.parametrize("queue, do", QUEUE.items())
def test_every_documented_state_of_a_queued_resource(queue, do):
  step = decide(Sight(queue, "why it is"), LIMITS)
  assert step.do is do
  assert bool(step.failure) is (do is Do.DELETE)
  if step.failure:
    assert step.failure == f"{queue}: why it is"


ACTIVE = [
  (see("booting", "idle"), Do.WAIT, ""),
  (see("installing", "idle", seconds=101), Do.DELETE, "installation takes too"),
  (see("broken pip failed", "idle"), Do.REPAIR, "installation failed: pip"),
  (see("idle", "idle"), Do.START, ""),
  (see("running", "running", seconds=1e9), Do.WAIT, ""),
  # Worker 0 evaluates, for as long as it takes, when the others are done.
  (see("running", "exited 0", seconds=1e9), Do.WAIT, ""),
  (see("exited 0", "exited 0"), Do.DONE, ""),
  (see("exited 143", "exited 143"), Do.START, "interrupted"),
  (see("exited 130 bye", "exited 0"), Do.START, "interrupted"),
  (see("exited 143", "idle"), Do.START, "interrupted"),
  (see("exited 1 ValueError: x", "exited 143"), Do.START, "exit code 1 (w-0: "),
  (see("exited 2 no such file", "exited 1"), Do.GIVE_UP, ""),
  (see("exited 2", "running"), Do.GIVE_UP, ""),
  # The others of a mesh notice, or are stopped.
  (see("exited 1", "running", seconds=99), Do.WAIT, ""),
  (see("exited 1", "running", seconds=101), Do.STOP, "exit code 1"),
  (see("exited 143", "running", seconds=101), Do.STOP, "workers differ"),
  # One host was booted anew.
  (see("idle", "running", seconds=101), Do.STOP, "workers differ"),
  (see("idle", "exited 0"), Do.START, "interrupted"),
  # Over ssh.
  (see("running", hosts=2, unreachable="x"), Do.WAIT, ""),
  (see("running", hosts=2, seconds=101), Do.DELETE, "workers do not answer"),
  (see(hosts=2, nodes=("READY",)), Do.WAIT, ""),
  (see(hosts=2, nodes=("READY", "PREEMPTED")), Do.DELETE, "a TPU VM is PREE"),
  (see(hosts=1, nodes=("MISSING",)), Do.DELETE, "a TPU VM is MISSING"),
]


@pytest.mark.parametrize("sight, do, failure", ACTIVE)
def test_what_workers_say_decides_when_active(sight, do, failure):
  step = decide(sight, LIMITS)
  assert step.do is do
  assert step.failure.startswith(failure)
  assert bool(step.failure) is bool(failure)


def test_no_state_of_two_workers_is_without_a_step_or_ends_it_wrongly():
  states = ("booting", "installing", "broken x", "idle", "running")
  states += tuple(f"exited {code}" for code in (0, 1, 2, 130, 137, 143))
  for pair in itertools.product(states, repeat=2):
    for seconds in (0, 1000):
      step = decide(see(*pair, seconds=seconds), LIMITS)
      assert step.why
      assert (step.do is Do.DONE) is (pair == ("exited 0", "exited 0")), pair
      if step.do is Do.START:
        assert not {"running", "booting", "installing"} & set(pair), pair
      if "exited 1" in pair and step.do in (Do.START, Do.STOP):
        assert step.failure, pair


def test_reports_are_found_among_other_output():
  text = (
    "SSH: Attempting to connect to worker 1...\n"
    "mole-worker b-w-1 exited 1 ValueError: train.jsonl line 3\n"
    "mole-worker a-w-0 running\nmole-worker is no report of ours:\n"
  )
  first, second = decisions.read_reports(text)
  assert (first.host, first.state) == ("a-w-0", "running")
  assert (second.code, second.last_line) == (
    1,
    "ValueError: train.jsonl line 3",
  )


def test_failures_are_the_same_but_for_ids():
  same = decisions.identity
  assert same("FAILED: operation-17a-44 stopped") == same(
    "FAILED: operation-18b-45 stopped"
  )
  assert same("FAILED: no capacity") != same("FAILED: no quota")
  assert same("exit code 1 (w-0: x)") == same("exit code 1 (w-3: y)")
  assert same("exit code 1") != same("exit code 137")
