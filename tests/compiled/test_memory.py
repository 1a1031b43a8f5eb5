"""Bytes on a device, refusals for memory, and what to do about them."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mole_jax.compiled import memory
from mole_jax.parallel import mesh as mesh_lib

GIB = 2**30


def test_the_peak_counts_donated_arguments_once():
  found = memory.Memory(
    arguments=10, outputs=6, aliased=5, temporaries=7, code=1
  )
  assert found.peak == 19


def test_a_compiled_program_is_measured():
  function = jax.jit(lambda x: x + 1, donate_argnums=0)
  shape = jax.ShapeDtypeStruct((128, 8), jnp.float32)
  found = memory.measure(function.lower(shape).compile())
  assert found.arguments == found.outputs == found.aliased == 128 * 8 * 4


def test_shards_are_counted():
  mesh = mesh_lib.make_mesh(dict(data=2, fsdp=4, expert=1, tensor=1))
  shapes = {
    "kernel": jax.ShapeDtypeStruct((8, 6), jnp.bfloat16),
    "bias": jax.ShapeDtypeStruct((6,), jnp.float32),
  }
  places = {
    "kernel": NamedSharding(mesh, P("fsdp")),
    "bias": NamedSharding(mesh, P()),
  }
  assert memory.shard_bytes(shapes, places) == 2 * 6 * 2 + 6 * 4


@pytest.mark.parametrize(
  ("message", "found"),
  [
    (
      "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory "
      "in memory space hbm. Used 20.50G of 15.75G hbm. Exceeded hbm capacity",
      (20.5 * GIB, 15.75 * GIB),
    ),
    (
      "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required "
      "for HLO temporaries (16.14G) exceeds available HBM (15.75G).",
      (16.14 * GIB, 15.75 * GIB),
    ),
    ("INTERNAL: something else", None),
  ],
)
def test_a_refusal_says_how_much(message, found):
  expected = None if found is None else tuple(map(int, found))
  assert memory.out_of_memory(message) == expected


KINDS = dict(rows=4, remat="named", fsdp=8, num_devices=64)


def test_what_fits_needs_no_advice():
  assert memory.advice(10 * GIB, 16 * GIB, GIB, **KINDS) == []


def test_advice_says_how_many_rows_fit():
  first, second = memory.advice(33 * GIB, 17 * GIB, GIB, **KINDS)
  assert "about 2 row(s) a device fit, it has 4" in first
  assert "remat" in second and "'named'" in second


def test_parameters_that_do_not_fit_want_shards():
  (first, *_) = memory.advice(33 * GIB, 17 * GIB, 15 * GIB, **KINDS)
  assert "--mesh" in first and "more than 8 shards" in first


def test_there_is_always_something_to_change():
  kinds = dict(rows=1, remat="full", fsdp=64, num_devices=64)
  (only,) = memory.advice(33 * GIB, 17 * GIB, GIB, **kinds)
  assert "max_length" in only and "tensor" in only
