"""The set of hashes against Python's own set."""

import hypothesis
from hypothesis import strategies as st

from mole_jax.data.builders.llava_json.seen import Seen


@hypothesis.given(
  st.lists(st.lists(st.binary(max_size=2), max_size=2).map(tuple))
)
def test_it_is_a_set_of_lists_of_bytes(items):
  seen, oracle = Seen(), set()
  for item in items:
    assert seen.add(*item) == (item not in oracle)
    oracle.add(item)
  assert len(seen) == len(oracle)


def test_it_remembers_all_while_it_grows():
  seen = Seen()
  items = [str(i).encode() for i in range(20_000)]
  assert all(seen.add(item) for item in items)
  assert not any(seen.add(item) for item in items)
  assert len(seen) == 20_000
