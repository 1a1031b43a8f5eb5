"""Numbers as people read them."""

import pytest

from mole_jax.compiled import terminal


@pytest.mark.parametrize(
  ("value", "step", "text"),
  [
    (0, 1000, "0"),
    (999, 1000, "999"),
    (1520, 1000, "1.52 K"),
    (148.6e12, 1000, "149 T"),
    (16 * 2**30, 1024, "16 Gi"),
    (1014 * 2**20, 1024, "1014 Mi"),
    (95.5 * 2**30, 1024, "95.5 Gi"),
  ],
)
def test_amounts(value, step, text):
  assert terminal.amount(value, step) == text
