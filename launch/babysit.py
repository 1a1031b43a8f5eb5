"""Keeps a run going on a queued resource until it is done or cannot be.

Looks, decides (decisions.py), acts, waits. All that it knows is read anew each
time, so it can be stopped and started again at any moment.
"""

import collections
import concurrent.futures
import dataclasses
import time
from collections.abc import Callable, Sequence

from launch import decisions, gcloud
from launch.decisions import Do

Run = Callable[[Sequence[str]], str]


class GaveUpError(RuntimeError):
  """The run does not get anywhere; the message says why."""


@dataclasses.dataclass(frozen=True)
class Plan:
  """What is to run, and when to stop trying."""

  target: gcloud.Target
  create: tuple[str, ...]  # argv
  command: tuple[str, ...]
  hosts: int  # Of all slices together.
  max_failures: int = 5
  healthy_seconds: float = 600.0
  poll_seconds: float = 60.0
  limits: decisions.Limits = decisions.Limits()


class Babysitter:
  """`watch` until done; GaveUpError or GcloudError otherwise."""

  def __init__(
    self,
    plan: Plan,
    *,
    run: Run = gcloud.run,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
    say: Callable[[str], None] = print,
  ):
    self._plan = plan
    self._run = run
    self._clock = clock
    self._sleep = sleep
    self._say = say
    self._said = ""
    self._failures: collections.Counter[str] = collections.Counter()
    self._running_since: float | None = None
    self._unlike_since: float | None = None

  def watch(self) -> None:
    """Runs until the command ended with 0 on every worker."""
    while True:
      try:
        step = self._step()
      except gcloud.GcloudError as error:
        if error.is_hopeless:
          raise
        self._note(f"gcloud: {error}")
        self._count_failure(f"gcloud: {error.text}")
      else:
        if step.do is Do.DONE:
          return
      self._sleep(self._plan.poll_seconds)

  def _step(self) -> decisions.Step:
    sight = self._look()
    step = decisions.decide(sight, self._plan.limits)
    about = "" if step.why.startswith(sight.queue) else f"{sight.queue}, "
    self._note(f"{about}{step.why} -> {step.do.value}")
    if step.do is Do.GIVE_UP:
      raise GaveUpError(step.why)
    if step.failure:
      self._count_failure(step.failure)
    self._forget(lambda failure: failure.startswith("gcloud: "))
    self._act(step)
    return step

  def _look(self) -> decisions.Sight:
    plan = self._plan
    queue, reason = gcloud.read_state(plan.target, self._run)
    if queue != "ACTIVE":
      self._running_since = self._unlike_since = None
      return decisions.Sight(queue, reason, num_hosts=plan.hosts)
    reports, trouble = self._on_all("state")
    nodes = ()
    if len(reports) < plan.hosts:
      nodes = tuple(self._node_state(node) for node in plan.target.nodes)
    now = self._clock()
    is_well = len(reports) == plan.hosts and {r.state for r in reports} == {
      "running"
    }
    if is_well:
      self._unlike_since = None
      if self._running_since is None:
        self._running_since = now
      if now - self._running_since >= plan.healthy_seconds:
        self._forget(decisions.is_of_platform)
    else:
      self._running_since = None
      if self._unlike_since is None:
        self._unlike_since = now
    unlike = 0.0 if self._unlike_since is None else now - self._unlike_since
    return decisions.Sight(
      queue,
      reason,
      reports=reports,
      num_hosts=plan.hosts,
      unreachable=trouble,
      nodes=nodes,
      seconds_unlike=unlike,
    )

  def _act(self, step: decisions.Step) -> None:
    plan = self._plan
    if step.do is Do.CREATE:
      try:
        self._run(plan.create)
      except gcloud.GcloudError as error:
        if not error.is_there_already:
          raise
    elif step.do is Do.DELETE:
      self._unlike_since = None
      try:
        self._run(gcloud.delete(plan.target, is_async=True))
      except gcloud.GcloudError as error:
        if not error.is_missing:
          raise
    elif step.do is Do.REPAIR:
      self._unlike_since = None
      self._on_all("repair")
    elif step.do in (Do.START, Do.STOP):
      self._unlike_since = None
      if step.do is Do.STOP:
        self._on_all("stop")
      reports, trouble = self._on_all("start", *plan.command)
      self._note(decisions.hosts_line(reports) + (trouble and f"; {trouble}"))

  def _on_all(self, *words: str) -> tuple[tuple[decisions.Report, ...], str]:
    """Calls worker.sh on all workers of all slices, at the same time."""
    target = self._plan.target

    def call(node: str) -> tuple[str, str]:
      try:
        return self._run(gcloud.on_workers(target, node, words)), ""
      except gcloud.GcloudError as error:
        if error.is_hopeless:
          raise
        return error.printed, f"{node}: {error.text.splitlines()[0]}"

    if len(target.nodes) == 1:  # No thread that Ctrl-C would wait for.
      answers = [call(target.name)]
    else:
      with concurrent.futures.ThreadPoolExecutor(len(target.nodes)) as pool:
        answers = list(pool.map(call, target.nodes))
    text = "\n".join(printed for printed, _ in answers)
    trouble = "; ".join(said for _, said in answers if said)
    return decisions.read_reports(text), trouble

  def _node_state(self, node: str) -> str:
    try:
      state = self._run(gcloud.describe_node(self._plan.target, node))
    except gcloud.GcloudError as error:
      if error.is_missing:
        return gcloud.MISSING
      return "unknown"
    return state.strip()

  def _count_failure(self, failure: str) -> None:
    name = decisions.identity(failure)
    self._failures[name] += 1
    if self._failures[name] >= self._plan.max_failures:
      raise GaveUpError(f"{self._failures[name]} times: {failure}")

  def _forget(self, is_history: Callable[[str], bool]) -> None:
    for failure in list(self._failures):
      if is_history(failure):
        del self._failures[failure]

  def _note(self, text: str) -> None:
    """Says what is new, once."""
    if text != self._said:
      self._said = text
      self._say(f"{time.strftime('%H:%M:%S')} {text}")
