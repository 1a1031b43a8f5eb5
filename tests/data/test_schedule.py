import pickle
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mole_jax.data.schedule import (
  Grouped,
  Packed,
  Schedule,
  measure_padding,
)

LIMITS = {"max_length": 256, "max_images": 8, "max_segments": 8}


def make_sets(*sizes, seed=0):
  """Lengths like those of the embedded set: an image of 16 and some text."""
  random = np.random.RandomState(seed)
  lengths = [random.randint(30, 90, size) for size in sizes]
  counts = [random.randint(0, 2, size) for size in sizes]
  return lengths, counts


def make_plan(sizes=(50, 70), weights=(1.0, 1.0), **kwargs):
  lengths, counts = make_sets(*sizes)
  return Packed(lengths, counts, weights, **{"seed": 0, **LIMITS, **kwargs})


def rows_of(plan, num_rows):
  return [plan.row(i) for i in range(num_rows)]


def entries_of(plan, num_windows):
  rows = rows_of(plan, num_windows * plan.rows_per_window)
  return [entry for row in rows for entry in row]


def padding_of(plan, lengths, max_length, num_rows=10**6):
  return measure_padding(plan, lengths, lambda rows: max_length, num_rows).share


def test_golden_plan():
  """If this fails, a resumed run would see other data than before.

  Change `schedule.VERSION` where that is meant.
  """
  plan = Packed(
    [np.array([4, 3, 2]), np.array([5, 1])],
    [np.array([0, 0, 0]), np.array([1, 0])],
    [2.0, 1.0],
    seed=7,
    max_length=8,
    max_images=1,
    max_segments=3,
    window_rows=12,
  )
  assert plan.draws_per_window == 32
  assert rows_of(plan, 21) == [
    [(0, 1), (0, 0)],
    [(1, 0)],
    [(0, 1), (0, 1)],
    [(0, 1), (0, 0)],
    [(1, 0)],
    [(0, 0), (0, 1)],
    [(1, 0)],
    [(0, 2), (1, 1)],
    [(0, 0), (0, 0)],
    [(0, 2), (1, 1)],
    [(1, 0)],
    [(1, 0)],
    [(0, 2), (0, 2)],
    [(1, 1)],
    [(0, 2), (1, 1)],
    [(1, 0)],
    [(0, 1)],
    [(0, 1), (0, 0)],
    [(0, 2), (0, 0)],
    [(1, 1)],
    [(0, 2)],
  ]


@st.composite
def problems(draw):
  sizes = draw(st.lists(st.integers(1, 60), min_size=1, max_size=4))
  max_length = draw(st.integers(1, 40))
  max_images = draw(st.integers(0, 3))

  def values(size, low, high):
    return np.array(
      draw(st.lists(st.integers(low, high), min_size=size, max_size=size))
    )

  return {
    "lengths": [values(size, 1, max_length) for size in sizes],
    "image_counts": [values(size, 0, max_images) for size in sizes],
    "weights": [draw(st.floats(0.01, 10)) for _ in sizes],
    "seed": draw(st.integers(0, 2**40)),
    "max_length": max_length,
    "max_images": max_images,
    "max_segments": draw(st.integers(1, 5)),
    "window_rows": draw(st.integers(1, 50)),
  }


@given(problem=problems(), first=st.integers(0, 10**9))
def test_every_row_keeps_to_the_limits_and_none_is_empty(problem, first):
  plan = Packed(**problem)
  for index in range(first, first + 30):
    row = plan.row(index)
    assert 1 <= len(row) <= problem["max_segments"]
    tokens = sum(problem["lengths"][d][r] for d, r in row)
    images = sum(problem["image_counts"][d][r] for d, r in row)
    assert tokens <= problem["max_length"]
    assert images <= problem["max_images"]


@given(problem=problems(), order=st.permutations(range(40)))
def test_a_row_is_the_same_whichever_was_asked_for_before(problem, order):
  expected = rows_of(Packed(**problem), 40)
  plan = Packed(**problem)
  assert {i: plan.row(i) for i in order} == dict(enumerate(expected))


@given(problem=problems())
def test_every_window_holds_the_draws_that_are_due(problem):
  plan = Packed(**problem)
  total = sum(problem["weights"])
  counts = np.zeros(len(problem["weights"]))
  for window in range(4):
    rows = range(
      window * plan.rows_per_window, (window + 1) * plan.rows_per_window
    )
    for row in map(plan.row, rows):
      for dataset, _ in row:
        counts[dataset] += 1
    drawn = (window + 1) * plan.draws_per_window
    assert counts.sum() == drawn
    due = np.array(problem["weights"]) / total * drawn
    assert np.abs(counts - due).max() < 1.5


@pytest.mark.parametrize("sizes", [(10, 200), (700, 31)])
def test_records_are_drawn_equally_often_within_a_data_set(sizes):
  plan = make_plan(sizes)
  entries = np.array(entries_of(plan, 6))
  for dataset, size in enumerate(sizes):
    counts = np.bincount(entries[entries[:, 0] == dataset, 1], minlength=size)
    assert counts.max() - counts.min() <= 1


def test_seeking_a_million_steps_takes_no_longer_than_a_second():
  """Of a million records; not a timing, but no number of steps matters."""
  random = np.random.RandomState(0)
  plan = Packed(
    [random.randint(30, 2000, 10**6), random.randint(30, 2000, 10**5)],
    [random.randint(0, 2, 10**6), random.randint(0, 2, 10**5)],
    [3.0, 1.0],
    seed=0,
    max_length=2048,
    max_images=8,
    max_segments=8,
  )
  began = time.process_time()
  plan.row(64 * 10**6)
  print(f"seek to step 1e6: {time.process_time() - began:.2f} s of CPU")
  assert len(plan._cache) == 1  # It was planned without those before it.


def test_the_seed_changes_the_plan_and_nothing_else_does():
  rows = rows_of(make_plan(), 40)
  assert rows_of(make_plan(), 40) == rows
  assert rows_of(make_plan(seed=1), 40) != rows
  assert rows_of(pickle.loads(pickle.dumps(make_plan())), 40) == rows


def test_the_global_random_state_is_neither_read_nor_moved():
  np.random.seed(1)
  before = np.random.get_state()[1].copy()
  first = rows_of(make_plan(), 40)
  np.testing.assert_array_equal(np.random.get_state()[1], before)
  np.random.seed(2)
  assert rows_of(make_plan(), 40) == first


def test_rows_of_a_window_are_not_sorted_by_length():
  lengths, _ = make_sets(50, 70)
  plan = make_plan(max_segments=1)
  drawn = [lengths[d][r] for d, r in entries_of(plan, 1)]
  assert np.mean(np.diff(drawn) > 0) > 0.3
  assert np.mean(np.diff(drawn) < 0) > 0.3


def test_neighbours_in_a_row_change_from_epoch_to_epoch():
  lengths, counts = [np.full(640, 64)], [np.ones(640, int)]
  plan = Packed(lengths, counts, [1.0], seed=0, window_rows=32, **LIMITS)
  assert plan.draws_per_window == 128
  pairs = [
    {
      frozenset((row[i][1], row[i + 1][1]))
      for row in rows_of(plan, (epoch + 1) * 160)[epoch * 160 :]
      for i in range(len(row) - 1)
    }
    for epoch in range(2)
  ]
  assert len(pairs[0]) == len(pairs[1]) == 480
  assert len(pairs[0] & pairs[1]) < 48


def long_tailed(size, seed):
  """Like instruction data: most are short, few are ten times as long."""
  random = np.random.RandomState(seed)
  text = np.clip(random.lognormal(5.3, 0.8, size), 20, 1400).astype(int)
  images = random.randint(0, 2, size)
  return text + 576 * images, images


@pytest.mark.parametrize("weights", [(1, 1, 1), (60, 30, 10), (5, 3, 1)])
@pytest.mark.parametrize("max_length", [2048, 4096])
def test_padding_of_instruction_data_is_below_a_twentieth(weights, max_length):
  sets = [long_tailed(size, size) for size in (30_000, 10_000, 2_000)]
  lengths, counts = zip(*sets, strict=True)
  plan = Packed(
    lengths, counts, weights, seed=0, max_length=max_length,
    max_images=12, max_segments=24,
  )  # fmt: skip
  assert padding_of(plan, lengths, max_length) < 0.05


def test_padding_counts_tokens():
  lengths = [np.array([2, 3]), np.array([4])]

  class Plan(Schedule):
    rows_per_window = 2

    def _make(self, number):
      return [[(0, 1), (1, 0)], [(0, 0)]]  # 7 and 2 of 10 each.

  assert padding_of(Plan(lengths, lengths, 0), lengths, 10, 2) == pytest.approx(
    11 / 20
  )
  assert padding_of(Plan(lengths, lengths, 0), lengths, 10, 0) == 0


def test_negative_rows_are_refused():
  with pytest.raises(IndexError, match="row -1; rows are counted from 0"):
    make_plan().row(-1)


@pytest.mark.parametrize(
  ("kwargs", "message"),
  [
    ({"weights": (1.0,)}, "2 data sets, 2 image counts, 1 weights"),
    ({"weights": (1.0, 0.0)}, "weight 0.0 of data set 1"),
    ({"weights": (1.0, float("nan"))}, "weight nan of data set 1"),
    ({"sizes": (5, 0)}, "data set 1 has 0 lengths"),
    ({"max_length": 20}, "tokens and . images fit in no row of max_length=20"),
    ({"max_images": 0}, "fit in no row of .*max_images=0"),
    ({"max_segments": 0}, "max_segments=0; wanted at least 1"),
    ({"window_rows": 0}, "window_rows=0"),
  ],
)
def test_impossible_plans_are_refused(kwargs, message):
  with pytest.raises(ValueError, match=message):
    make_plan(**kwargs)


@pytest.fixture
def grouped():
  sets = [long_tailed(size, size) for size in (3_000, 500)]
  lengths, counts = zip(*sets, strict=True)
  plan = Grouped(
    lengths, counts, [3, 1], seed=0, batch_size=8, max_length=2048,
    max_images=1,
  )  # fmt: skip
  return plan, lengths, counts


def batches_of(plan, window=0):
  first = window * plan.rows_per_window
  rows = [plan.row(first + i) for i in range(plan.rows_per_window)]
  return [rows[i : i + 8] for i in range(0, len(rows), 8)]


def test_batches_by_modality_have_images_throughout_or_not_at_all(grouped):
  plan, _, counts = grouped
  for window in range(3):
    kinds = [
      {bool(counts[d][r]) for ((d, r),) in batch}
      for batch in batches_of(plan, window)
    ]
    assert kinds.count({True, False}) <= 1
    assert kinds.count({True}) > 5 and kinds.count({False}) > 5


def test_batches_by_modality_hold_rows_of_like_lengths(grouped):
  plan, lengths, _ = grouped
  spread, total = [], []
  for batch in batches_of(plan):
    tokens = [lengths[d][r] for ((d, r),) in batch]
    spread.append(max(tokens) - min(tokens))
    total += tokens
  assert np.mean(spread) < 0.15 * (max(total) - min(total))


def test_batches_by_modality_come_in_no_order_of_length(grouped):
  plan, lengths, _ = grouped
  first = [
    lengths[batch[0][0][0]][batch[0][0][1]] for batch in batches_of(plan)
  ]
  assert 0.25 < np.mean(np.diff(first) > 0) < 0.75


def test_grouping_draws_what_packing_would(grouped):
  plan, lengths, _ = grouped
  entries = [row[0] for batch in batches_of(plan) for row in batch]
  assert len(entries) == plan.draws_per_window
  assert sum(d == 0 for d, _ in entries) == pytest.approx(
    0.75 * len(entries), abs=1
  )
  assert len(set(entries)) == len(entries)
