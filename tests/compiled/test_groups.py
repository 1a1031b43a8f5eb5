"""Groups of devices, in every way that XLA writes them."""

import numpy as np
import pytest

from mole_jax.compiled import groups

MESH = {"data": 4, "fsdp": 16, "expert": 1, "tensor": 1}


@pytest.mark.parametrize(
  ("text", "expected"),
  [
    ("replica_groups={{0,2},{1,3}}, x=1", [[0, 2], [1, 3]]),
    ("replica_groups={}, x=1", [[0, 1, 2, 3]]),
    ("replica_groups=[2,2]<=[4], x=1", [[0, 1], [2, 3]]),
    ("replica_groups=[2,2]<=[2,2]T(1,0), x=1", [[0, 2], [1, 3]]),
    ("replica_groups=mesh['a'=2,'b'=2] {'b'}, x=1", [[0, 1], [2, 3]]),
    ("replica_groups=mesh['a'=2,'b'=2] {'a'}, x=1", [[0, 2], [1, 3]]),
    ("replica_groups=mesh['a'=2,'b'=2] {'a','b'}", [[0, 1, 2, 3]]),
    ("replica_groups=mesh['a'=4] {'a':(2)2}", [[0, 1], [2, 3]]),
    ("replica_groups=mesh['a'=4] {'a':(1)2}", [[0, 2], [1, 3]]),
    (
      "replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}",
      [[0, 1], [2, 3]],
    ),
    (
      "replica_groups=mesh['a'=2,'b'=2], device_ids=(3,2,1,0) {'b'}",
      [[3, 2], [1, 0]],
    ),
    ("source_target_pairs={{0,1},{1,0}}, x=1", [[0, 1], [1, 0]]),
  ],
)
def test_groups_are_read(text, expected):
  found = groups.parse_groups(f", channel_id=1, {text}", 4)
  np.testing.assert_array_equal(found, expected)


def test_what_names_no_group_is_none():
  assert groups.parse_groups(", channel_id=1", 4) is None


@pytest.mark.parametrize(
  ("text", "axes"),
  [
    # As XLA:TPU prints them for 64 chips, mesh (4, 16).
    (
      "replica_groups=mesh['axis_0'=16,'axis_1'=1,'axis_2'=4], "
      "device_ids=([4,16]T(1,0)) {'axis_0'}",
      ("fsdp",),
    ),
    (
      "replica_groups=mesh['axis_0'=16,'axis_1'=1,'axis_2'=4], "
      "device_ids=([4,16]T(1,0)) {'axis_2'}",
      ("data",),
    ),
    ("replica_groups=mesh['axis_0'=64] {'axis_0'}", ("data", "fsdp")),
    ("replica_groups=[4,16]<=[64]", ("fsdp",)),
    ("replica_groups=[16,4]<=[4,16]T(1,0)", ("data",)),
  ],
)
def test_axes_are_those_along_which_members_differ(text, axes):
  found = groups.parse_groups(text, 64)
  assert groups.axes_of(found, MESH) == axes
