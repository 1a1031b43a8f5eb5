"""The roofline, and the rate of links along mesh axes."""

import types

import numpy as np
import pytest

from mole_jax.compiled import collectives, estimate, hlo, work
from mole_jax.parallel import accelerators

V5P = accelerators.find("v5p:4x4x4").chip
V5E = accelerators.find("v5e:4x4").chip
H200 = accelerators.find("h200:8").chip


def devices(*bounds):
  """Fake chips of a torus, x fastest."""
  coords = [tuple(reversed(c)) for c in np.ndindex(*reversed(bounds))]
  return np.array(
    [
      types.SimpleNamespace(id=i, coords=[*c, 0, 0][:3])
      for i, c in enumerate(coords)
    ]
  )


def collective(axes, size, is_async):
  array = hlo.Array("u8", (size,))
  return collectives.Collective(
    "collective-permute", (array,), 1, (), axes, 2, is_async, "", ""
  )


def operation(**values):
  known = dict(flops=0.0, hbm_bytes=0.0, cycles=0)
  return work.Operation("x", "", 1, **(known | values))


def test_a_step_is_the_sum_of_what_limits_each_instruction():
  mesh = {"data": 1, "fsdp": 64}
  array = devices(4, 4, 4).reshape(1, 64)
  done = work.Work(
    (
      operation(flops=V5P.peak_flops, hbm_bytes=1.0),  # 1 s
      operation(flops=1.0, hbm_bytes=2765e9 * 2),  # 2 s
      operation(flops=1.0, cycles=int(1.75e9 * 3)),  # 3 s
    ),
    {},
  )
  rate = int(V5P.ici_bytes_per_second)
  found = [
    collective(("fsdp",), 4 * rate, True),
    collective(("fsdp",), 5 * rate, False),
  ]
  guess = estimate.step_estimate(done, found, V5P, mesh, array)
  assert guess.compute_seconds == pytest.approx(6)
  assert guess.hidden_seconds == pytest.approx(4)
  assert guess.step_seconds == pytest.approx(6 + 5)
  # Without cycles only the first two take time: less than what goes on beside.
  assert guess.roofline_seconds == pytest.approx(3)
  assert guess.least_seconds == pytest.approx(4 + 5)


def test_copies_to_the_chip_go_on_beside_products():
  rate = V5P.hbm_bytes_per_second
  product = operation(flops=4 * V5P.peak_flops, hbm_bytes=rate)
  copy = operation(hbm_bytes=2 * rate, is_async=True)
  one = devices(1)
  guess = lambda *done: estimate.step_estimate(
    work.Work(done, {}), [], V5P, {"data": 1}, one
  )
  assert guess(product, copy).step_seconds == pytest.approx(4)
  # But all of them share the memory's bandwidth.
  assert guess(product, copy, copy).step_seconds == pytest.approx(5)


def test_fake_devices_take_no_time():
  chip = accelerators.Chip("cpu", 0, 0.0, 0.0, platform="cpu")
  done = work.Work((operation(flops=1.0),), {})
  guess = estimate.step_estimate(done, [], chip, {"data": 1}, devices(1))
  assert guess.step_seconds == 0


def test_an_axis_over_two_of_three_dimensions_has_two_thirds_of_the_links():
  array = devices(4, 4, 4).reshape(4, 16)
  mesh = {"data": 4, "fsdp": 16}
  whole = V5P.ici_bytes_per_second
  rate = lambda *axes: estimate.link_rate(V5P, axes, mesh, array)
  assert rate("fsdp") == pytest.approx(whole * 2 / 3)
  assert rate("data") == pytest.approx(whole / 3)
  assert rate("data", "fsdp") == pytest.approx(whole)


def test_a_dimension_that_closes_to_no_ring_has_half():
  array = devices(4, 4).reshape(1, 16)
  rate = estimate.link_rate(V5E, ["fsdp"], {"data": 1, "fsdp": 16}, array)
  assert rate == pytest.approx(V5E.ici_bytes_per_second / 2)
  array = devices(16, 16).reshape(16, 16)
  rate = estimate.link_rate(V5E, ["fsdp"], {"data": 16, "fsdp": 16}, array)
  assert rate == pytest.approx(V5E.ici_bytes_per_second / 2)


def test_hosts_with_gpus_speak_over_the_network():
  array = devices(16, 1).reshape(2, 8)
  mesh = {"data": 2, "fsdp": 8}
  rate = lambda axis: estimate.link_rate(H200, [axis], mesh, array)
  assert rate("fsdp") == H200.ici_bytes_per_second
  assert rate("data") == estimate.NETWORK_BYTES_PER_SECOND


def test_every_chip_has_its_rates():
  for chip in accelerators.CHIPS:
    assert chip.hbm_bytes_per_second > 0
