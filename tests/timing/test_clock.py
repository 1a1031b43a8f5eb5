import pytest

from mole_jax.timing import clock


def test_summary_is_of_the_middle_and_ignores_how_long_the_longest_is():
  found = clock.summary([3.0, 1.0, 2.0, 4.0, 900.0])
  assert found == {
    "median": 3.0,
    "quartile_1": 2.0,
    "quartile_3": 4.0,
    "count": 5,
  }
  with pytest.raises(ValueError, match="one step or more"):
    clock.summary([])


def test_interleaved_calls_alternate():
  called = []

  def timed(name):
    return lambda: float(called.append(name) is None) * len(called)

  found = clock.interleave([timed("a"), timed("b")], 3)
  assert called == ["a", "b"] * 3
  assert found == [[1.0, 3.0, 5.0], [2.0, 4.0, 6.0]]


def test_ratios_are_taken_within_a_round():
  # Twice as long in each round, on a machine that slows down tenfold.
  assert clock.ratio([2.0, 20.0, 2.0], [1.0, 10.0, 1.0])["median"] == 2.0
