"""What to do next about a run on a queued resource: a table, and no action.

The states are those that the Cloud TPU API documents for queued resources.
ACCEPTED is the older name of WAITING_FOR_RESOURCES. A spot TPU that was taken
away ends up SUSPENDED and never comes back by itself.
"""

import dataclasses
import enum
import re
from collections.abc import Sequence

from launch import gcloud

# main.py's exit codes that mean: everything saved, run the command again.
RESUME_CODES = frozenset({130, 143})
# Its code for a wrong command or configuration, which no repetition mends.
USAGE_CODE = 2

WAITING = frozenset(
  {
    "CREATING",
    "ACCEPTED",
    "WAITING_FOR_RESOURCES",
    "PROVISIONING",
    "SUSPENDING",
    "DELETING",
    "STATE_UNSPECIFIED",
  }
)
GONE = frozenset({"SUSPENDED", "FAILED"})
# States of a TPU VM from which it does not come back.
NODE_GONE = frozenset(
  {"PREEMPTED", "TERMINATED", "STOPPED", "STOPPING", "DELETING", "MISSING"}
)

_REPORT = re.compile(
  r"^mole-worker (\S+) (booting|installing|broken|idle|running|exited) ?(.*)$",
  re.M,
)


class Do(enum.Enum):
  WAIT = "wait"
  CREATE = "create"
  DELETE = "delete"
  START = "start"
  REPAIR = "install again"
  STOP = "stop, then start"
  DONE = "done"
  GIVE_UP = "give up"


@dataclasses.dataclass(frozen=True)
class Report:
  """What one worker says of itself."""

  host: str
  state: str  # booting, installing, broken, idle, running, exited
  detail: str = ""

  @property
  def code(self) -> int | None:
    """Exit code of a job that ended; the last line of its log comes after."""
    return int(self.detail.split()[0]) if self.state == "exited" else None

  @property
  def last_line(self) -> str:
    return self.detail.partition(" ")[2]


@dataclasses.dataclass(frozen=True)
class Sight:
  """Everything that a decision rests on; times are seconds."""

  queue: str
  reason: str = ""
  reports: tuple[Report, ...] = ()
  num_hosts: int = 1
  unreachable: str = ""  # Why a worker did not answer.
  nodes: tuple[str, ...] = ()  # States of the TPU VMs, where that was asked.
  seconds_unlike: float = 0.0  # Since the workers were last all well.


@dataclasses.dataclass(frozen=True)
class Limits:
  """Seconds that things may take while the resource is ACTIVE."""

  install: float = 1800.0
  unreachable: float = 900.0
  settle: float = 300.0  # For the others, once one worker's job has failed.


@dataclasses.dataclass(frozen=True)
class Step:
  """What to do and why; `failure` names what counts towards giving up."""

  do: Do
  why: str
  failure: str = ""


def read_reports(text: str) -> tuple[Report, ...]:
  """The lines of worker.sh among whatever ssh printed; the last of a host."""
  found = {m[1]: Report(m[1], m[2], m[3]) for m in _REPORT.finditer(text)}
  return tuple(found[host] for host in sorted(found))


def decide(sight: Sight, limits: Limits = Limits()) -> Step:  # noqa: B008
  """The step for a state of the queued resource."""
  if sight.queue == gcloud.MISSING:
    return Step(Do.CREATE, "there is none")
  if sight.queue in GONE:
    reason = sight.reason or "no reason given"
    failure = f"{sight.queue}: {reason}"
    return Step(Do.DELETE, failure, failure)
  if sight.queue == "ACTIVE":
    return _decide_active(sight, limits)
  what = sight.queue if sight.queue in WAITING else f"{sight.queue} (unknown)"
  return Step(Do.WAIT, what)


def _decide_active(sight: Sight, limits: Limits) -> Step:
  gone = sorted(set(sight.nodes) & NODE_GONE)
  if gone:
    failure = f"a TPU VM is {', '.join(gone)}"
    return Step(Do.DELETE, failure, failure)
  if len(sight.reports) < sight.num_hosts:
    why = sight.unreachable or "no report from some"
    text = f"{len(sight.reports)} of {sight.num_hosts} workers answer: {why}"
    if sight.seconds_unlike > limits.unreachable:
      return Step(Do.DELETE, text, "workers do not answer")
    return Step(Do.WAIT, text)
  states = {report.state for report in sight.reports}
  if "broken" in states:
    (first, *_) = [r for r in sight.reports if r.state == "broken"]
    why = f"installation failed on {first.host}: {first.detail}"
    return Step(Do.REPAIR, why, f"installation failed: {first.detail}")
  if states & {"booting", "installing"}:
    count = sum(r.state in ("booting", "installing") for r in sight.reports)
    why = f"{count} of {sight.num_hosts} workers install"
    if sight.seconds_unlike > limits.install:
      return Step(Do.DELETE, why, "installation takes too long")
    return Step(Do.WAIT, why)
  return _decide_jobs(sight, limits)


def _decide_jobs(sight: Sight, limits: Limits) -> Step:
  codes = sorted({r.code for r in sight.reports if r.code is not None})
  running = sum(r.state == "running" for r in sight.reports)
  idle = any(r.state == "idle" for r in sight.reports)
  if USAGE_CODE in codes:
    why = "a wrong command or configuration, which no repetition mends: "
    return Step(Do.GIVE_UP, why + _ended(sight.reports, [USAGE_CODE]))
  failed = [c for c in codes if c and c not in RESUME_CODES]
  if running:
    if not idle and set(codes) <= {0}:
      # Worker 0 evaluates and writes the report after the others.
      return Step(Do.WAIT, f"running on {running} of {sight.num_hosts} workers")
    why = f"{running} of {sight.num_hosts} workers run" + (
      f", others ended with {', '.join(map(str, codes))}" if codes else ""
    )
    if sight.seconds_unlike <= limits.settle:
      return Step(Do.WAIT, why)
    failure = _ended(sight.reports, failed) if failed else "workers differ"
    return Step(Do.STOP, why, failure)
  if codes == [0] and not idle:
    return Step(Do.DONE, "every worker ended with exit code 0")
  if failed:
    failure = _ended(sight.reports, failed)
    return Step(Do.START, failure, failure)
  if codes:
    text = ", ".join(map(str, codes))
    return Step(
      Do.START, f"interrupted ({text}), everything saved", "interrupted"
    )
  return Step(Do.START, "no job yet in this boot")


def _ended(reports: Sequence[Report], codes: Sequence[int]) -> str:
  """The codes, and what the first worker with one of them said last."""
  first = next(r for r in reports if r.code in codes)
  said = f" ({first.host}: {first.last_line})" if first.last_line else ""
  return f"exit code {', '.join(map(str, codes))}{said}"


def identity(failure: str) -> str:
  """What makes two failures the same: their text but for numbers in ids.

  For jobs it is the exit codes: what they say last may differ by host.
  """
  if failure.startswith("exit code"):
    return failure.partition(" (")[0]
  return re.sub(r"[0-9a-f]*\d[0-9a-f-]*", "#", failure)


def is_of_platform(failure: str) -> bool:
  """Whether good running since then makes a failure history."""
  return not failure.startswith(("exit code", "installation"))


def hosts_line(reports: Sequence[Report]) -> str:
  """How many workers are in which state."""
  counts: dict[str, int] = {}
  for report in reports:
    name = f"{report.state} {report.detail}".strip()
    counts[name] = counts.get(name, 0) + 1
  return ", ".join(f"{n} {name}" for name, n in sorted(counts.items()))
