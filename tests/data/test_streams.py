import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mole_jax.data import streams
from mole_jax.data.streams import Shares, Stream

weights = st.lists(st.floats(0.001, 10), min_size=1, max_size=12)


def shares_of(values, draws=100):
  return Shares([value / sum(values) for value in values], draws)


@given(values=weights, num_draws=st.integers(0, 10**9))
def test_draws_are_shared_out_exactly_and_never_given_back(values, num_draws):
  shares = shares_of(values)
  before, after = shares.drawn(num_draws), shares.drawn(num_draws + 1)
  assert sum(before) == num_draws
  assert sorted(np.subtract(after, before)) == [0] * (len(values) - 1) + [1]
  due = np.multiply(shares.shares, num_draws)
  assert np.abs(np.subtract(before, due)).max() < 1.5


@st.composite
def problems(draw):
  values = draw(weights)
  index = draw(st.integers(0, len(values) - 1))
  numbers = [(1, 600), (1, 400), (1, 4), (0, 1000)]
  return values, index, *(draw(st.integers(*each)) for each in numbers)


def make_stream(problem):
  """A stream, and what it is of; a record is known by its length."""
  values, index, draws, size, num_counts, seed = problem
  order = streams.permutation(size, (size,))
  lengths = np.arange(1, size + 1)[order]
  images = (np.arange(size) * num_counts // size)[order]
  stream = Stream(lengths, images, shares_of(values, draws), index, seed)
  return stream, lengths, images


@given(problem=problems(), start=st.integers(0, 10**6))
def test_a_window_brings_a_quantile_no_more_than_was_said(problem, start):
  """The bound that packing rests on."""
  stream, lengths, images = make_stream(problem)
  most_tokens, most_images = stream.largest()
  low = min(streams.NUM_OPTIONAL, stream.num_quantiles)
  for number in range(start, start + 4):
    records, quantiles = stream.window(number)
    assert len(set(quantiles)) == len(quantiles)
    assert set(range(low, stream.num_quantiles)) <= set(quantiles)
    for record, quantile in zip(records, quantiles, strict=True):
      # Those that may be missing stand for each other.
      alike = slice(0, low) if quantile < low else slice(quantile, quantile + 1)
      assert lengths[record] <= most_tokens[alike].max()
      assert images[record] <= most_images[alike].max()


@given(problem=problems())
def test_an_epoch_holds_every_record_once(problem):
  stream, lengths, _ = make_stream(problem)
  size, drawn, number = len(lengths), [], 0
  while len(drawn) < 3 * size and number < 3000:
    drawn += stream.window(number)[0].tolist()
    number += 1
  for epoch in range(len(drawn) // size):
    part = drawn[epoch * size : (epoch + 1) * size]
    assert sorted(part) == list(range(size))


def test_each_epoch_is_shuffled_anew():
  shares = Shares([1.0], 64)
  lengths = np.random.RandomState(0).randint(10, 99, 640)
  stream = Stream(lengths, np.ones(640, int), shares, 0, 0)
  epochs = [
    np.concatenate([stream.window(10 * e + w)[0] for w in range(10)])
    for e in range(3)
  ]
  for one, other in [(0, 1), (1, 2), (0, 2)]:
    # In other windows, not in another order of one window.
    same = [
      len(set(epochs[one][i : i + 64]) & set(epochs[other][i : i + 64]))
      for i in range(0, 640, 64)
    ]
    assert 2 < np.mean(same) < 12  # By chance: 6.4.


def test_windows_are_alike_in_length():
  """By chance the sums would differ by 2,000 or so."""
  lengths = np.random.RandomState(0).randint(1, 1000, 5000)
  stream = Stream(lengths, np.zeros(5000, int), Shares([1.0], 50), 0, 0)
  sums = [lengths[stream.window(i)[0]].sum() for i in range(200)]
  assert np.ptp(sums) < 3 * 1000


@pytest.mark.parametrize("size", [1, 3])
def test_a_tiny_set_is_repeated_within_a_window(size):
  stream = Stream(
    np.arange(size) + 1, np.zeros(size, int), Shares([1.0], 30), 0, 0
  )
  records, _ = stream.window(7)
  np.testing.assert_array_equal(np.bincount(records), [30 // size] * size)
