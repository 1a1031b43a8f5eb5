"""Whole sessions against a gcloud on PATH that plays them; no real waiting."""

import pytest

from launch import babysit, gcloud
from mole_jax.parallel import accelerators
from tests.launch import fakes
from tests.launch.fakes import missing, queue, workers

ACCELERATOR = accelerators.find("v5e:4x4")
COMMAND = ("python", "-m", "mole_jax.main", "--workdir=runs/it's mine")
RUNNING = ["running"] * 4
DONE = workers(*["exited 0"] * 4)


class Clock:
  """Time passes by sleeping only."""

  def __init__(self):
    self.now = 0.0

  def __call__(self):
    return self.now

  def sleep(self, seconds):
    self.now += seconds
    assert self.now < 1e6, "it never ends"


@pytest.fixture
def fake(tmp_path, monkeypatch):
  made = fakes.Gcloud(tmp_path)
  monkeypatch.setenv("PATH", fakes.path_with(made.path))
  return made


def watch(slices=1, **settings):
  """Runs to the end; what was said, and the error if it gave up."""
  target = gcloud.Target("mole3", "us-west4-a", slices=slices)
  plan = babysit.Plan(
    target,
    tuple(gcloud.create(target, ACCELERATOR, "s.sh", options=["--spot"])),
    COMMAND,
    hosts=ACCELERATOR.hosts * slices,
    **settings,
  )
  said, clock = [], Clock()
  sitter = babysit.Babysitter(
    plan, clock=clock, sleep=clock.sleep, say=said.append
  )
  try:
    sitter.watch()
  except (babysit.GaveUpError, gcloud.GcloudError) as error:
    return said, error
  return said, None


def test_created_waited_for_run_suspended_recreated_and_done(fake):
  fake.play(
    describe=[
      missing(),
      queue("CREATING"),
      queue("WAITING_FOR_RESOURCES"),
      queue("PROVISIONING"),
      queue("ACTIVE"),
      queue("ACTIVE"),
      queue("ACTIVE"),
      queue("SUSPENDING"),
      queue("SUSPENDED", stateInitiator="SERVICE"),
      queue("DELETING"),
      missing(),
      queue("ACTIVE"),
      queue("ACTIVE"),
    ],
    state=[
      workers("installing", "idle", "booting", "idle"),
      workers(*["idle"] * 4),
      workers(*RUNNING),
      workers(*["idle"] * 4),
      DONE,
    ],
    start=[workers(*RUNNING)],
  )
  said, error = watch()
  assert error is None
  assert fake.verbs == [
    *["describe", "create", "describe", "describe", "describe"],
    *["describe", "state", "describe", "state", "start", "describe", "state"],
    *["describe", "describe", "delete", "describe", "describe", "create"],
    *["describe", "state", "start", "describe", "state"],
  ]
  calls = fake.calls
  # The same machines and the same command, so the same workdir.
  creates = [argv for verb, argv in calls if verb == "create"]
  starts = [argv for verb, argv in calls if verb == "start"]
  assert creates[0] == creates[1] and starts[0] == starts[1]
  assert "--worker=all" in starts[0]
  assert "'--workdir=runs/it'\"'\"'s mine'" in starts[0][-1]
  (delete,) = [argv for verb, argv in calls if verb == "delete"]
  assert "--force" in delete
  assert any("SUSPENDED: SERVICE -> delete" in line for line in said)


def test_it_can_begin_in_the_middle(fake):
  fake.play(describe=[queue("ACTIVE")], state=[workers(*RUNNING), DONE])
  assert watch()[1] is None
  assert fake.verbs == ["describe", "state"] * 2


def test_what_is_preempted_under_a_resource_that_is_active(fake):
  gone = {"err": "ERROR: TPU is in state PREEMPTED\n", "code": 1}
  fake.play(
    describe=[queue("ACTIVE"), missing(), queue("ACTIVE")],
    state=[gone, DONE],
    node=[{"out": "PREEMPTED\n"}],
  )
  assert watch()[1] is None
  verbs = ["describe", "state", "node", "delete", "describe", "create"]
  assert fake.verbs == [*verbs, "describe", "state"]


def test_all_slices_are_started(fake):
  first, second = workers(*["idle"] * 4), workers(*["idle"] * 4)
  second["out"] = second["out"].replace("t1v", "t2v")
  last = {"out": DONE["out"].replace("t1v", "t2v")}
  fake.play(describe=[queue("ACTIVE")], state=[first, second, DONE, last])
  assert watch(slices=2)[1] is None
  assert sorted(argv[5] for verb, argv in fake.calls if verb == "start") == [
    "mole3-0",
    "mole3-1",
  ]


def test_interrupted_runs_are_resumed_and_failed_ones_so_often(fake):
  fails = workers("exited 1 ValueError: no disk", *["exited 134"] * 3)
  saved = workers(*["exited 143"] * 4)
  fake.play(describe=[queue("ACTIVE")], state=[saved, fails, saved, fails])
  said, error = watch(max_failures=3)
  assert isinstance(error, babysit.GaveUpError)
  assert str(error) == (
    "3 times: exit code 1, 134 (t1v-w-0: ValueError: no disk)"
  )
  assert fake.verbs.count("start") == 4
  assert "delete" not in fake.verbs


def test_a_wrong_command_is_not_repeated(fake):
  wrong = workers(*["exited 2 error: config.batch_size=130 must be"] * 4)
  fake.play(describe=[queue("ACTIVE")], state=[wrong])
  said, error = watch()
  assert "config.batch_size=130 must be" in str(error)
  assert "start" not in fake.verbs


def failed(text):
  return queue("FAILED", failedData={"error": {"message": text}})


def test_identical_failures_of_the_platform_end_it_with_the_reason(fake):
  fake.play(
    describe=[
      answer
      for i in range(9)
      for answer in (failed(f"no quota, operation-{i}a-{i}"), missing())
    ]
  )
  said, error = watch(max_failures=3)
  assert str(error) == "3 times: FAILED: no quota, operation-2a-2"
  assert fake.verbs.count("create") == 2
  assert fake.verbs.count("delete") == 2


def test_being_preempted_again_and_again_after_good_runs_is_no_failure(fake):
  good = [queue("ACTIVE")] * 3  # 600 seconds from the first to the last.
  session = [*good, queue("SUSPENDED"), missing()]
  fake.play(
    describe=[*session * 3, queue("ACTIVE")],
    state=[workers(*RUNNING)] * 9 + [DONE],
  )
  times = dict(poll_seconds=300, healthy_seconds=600)
  assert watch(max_failures=2, **times)[1] is None
  assert fake.verbs.count("create") == 3
  # Without a good run in between it is.
  fake.play(describe=[queue("SUSPENDED"), missing()] * 4)
  assert "2 times: SUSPENDED" in str(watch(max_failures=2)[1])


def test_errors_and_silence_of_gcloud_are_waited_out(fake):
  unavailable = {"err": "ERROR: (gcloud) UNAVAILABLE: later\n", "code": 1}
  fake.play(
    describe=[
      unavailable,
      queue("ACTIVE"),
      unavailable,
      queue("ACTIVE"),
      unavailable,
      queue("ACTIVE"),
    ],
    state=[workers(*RUNNING), workers(*RUNNING), DONE],
  )
  assert watch(max_failures=2)[1] is None
  fake.play(describe=[unavailable])
  said, error = watch(max_failures=4)
  assert "4 times: gcloud: ERROR: (gcloud) UNAVAILABLE: later" in str(error)
  assert fake.verbs == ["describe"] * 4


def test_a_slow_answer_counts_as_none(fake, monkeypatch):
  monkeypatch.setattr(gcloud.run, "__defaults__", (0.5,))
  fake.play(describe=[{"sleep": 30}, queue("ACTIVE")], state=[DONE])
  said, error = watch()
  assert error is None
  assert any("no answer within 0.5 s" in line for line in said)


def test_what_cannot_get_better_ends_it_at_once(fake):
  denied = {"err": "ERROR: (gcloud) PERMISSION_DENIED: tpu.create\n", "code": 1}
  fake.play(describe=[missing()], create=[denied])
  said, error = watch()
  assert "PERMISSION_DENIED" in str(error)
  assert fake.verbs == ["describe", "create"]


def test_a_resource_that_is_there_already_is_taken_over(fake):
  there = {"err": "ERROR: (gcloud) ALREADY_EXISTS: it\n", "code": 1}
  fake.play(describe=[missing(), queue("ACTIVE")], create=[there], state=[DONE])
  assert watch()[1] is None


def test_a_host_that_was_booted_anew_has_all_start_again(fake):
  half = workers("idle", "running", "running", "running")
  fake.play(
    describe=[queue("ACTIVE")],
    state=[workers(*RUNNING), *[half] * 7, workers(*RUNNING), DONE],
  )
  assert watch()[1] is None
  assert fake.verbs.count("stop") == fake.verbs.count("start") == 1
  assert fake.verbs.index("stop") < fake.verbs.index("start")


def test_a_failed_installation_is_tried_again_on_the_same_machines(fake):
  broken = workers("broken install_package failed three times", *["idle"] * 3)
  fake.play(describe=[queue("ACTIVE")], state=[broken])
  said, error = watch(max_failures=3)
  assert str(error).startswith("3 times: installation failed: install_package")
  assert fake.verbs.count("repair") == 2
  assert "delete" not in fake.verbs
