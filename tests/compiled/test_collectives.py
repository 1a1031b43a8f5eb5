"""Collectives of programs whose collectives are known."""

# ruff: noqa: E501 (a program's lines are as long as they are)

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from mole_jax.compiled import collectives, hlo
from mole_jax.parallel import mesh as mesh_lib

SIZES = dict(data=2, fsdp=4, expert=1, tensor=1)
LAYERS = 3


def compiled(step, num_rows):
  """Collectives of `step` on shards [rows / 8, 6], in a scan."""
  mesh = mesh_lib.make_mesh(SIZES)
  spec = P(("data", "fsdp"))

  def function(x):
    body = lambda x, _: (step(x), None)
    return jax.lax.scan(body, x, length=LAYERS)[0]

  mapped = jax.shard_map(
    function, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False
  )
  shape = jax.ShapeDtypeStruct((num_rows, 6), jnp.float32)
  text = jax.jit(mapped).lower(shape).compile().as_text()
  return collectives.find(hlo.parse(text), SIZES)


BYTES = 8 * 6 * 4  # Of a shard: 8 rows.
RING = [(i, (i + 1) % 4) for i in range(4)]


@pytest.mark.parametrize(
  ("step", "kind", "axes", "result", "sent"),
  [
    (
      lambda x: jax.lax.all_gather(x, "fsdp").sum(0),
      "all-gather",
      ("fsdp",),
      4 * BYTES,
      3 * BYTES,
    ),
    (
      lambda x: jax.lax.psum(x, "data"),
      "all-reduce",
      ("data",),
      BYTES,
      BYTES,
    ),
    (
      lambda x: jax.lax.psum(x, ("data", "fsdp")),
      "all-reduce",
      ("data", "fsdp"),
      BYTES,
      2 * BYTES * 7 / 8,
    ),
    (
      lambda x: jnp.tile(jax.lax.psum_scatter(x, "fsdp", tiled=True), (4, 1)),
      "reduce-scatter",
      ("fsdp",),
      BYTES / 4,
      BYTES * 3 / 4,
    ),
    (
      lambda x: jax.lax.ppermute(x, "fsdp", RING),
      "collective-permute",
      ("fsdp",),
      BYTES,
      BYTES,
    ),
    (
      lambda x: jax.lax.all_to_all(x.reshape(4, 2, 6), "fsdp", 0, 0).reshape(
        8, 6
      ),
      "all-to-all",
      ("fsdp",),
      BYTES,
      BYTES * 3 / 4,
    ),
  ],
)
def test_kind_axis_loop_and_bytes(step, kind, axes, result, sent):
  (found,) = compiled(step, 64)
  assert (found.kind, found.axes, found.loops) == (kind, axes, (LAYERS,))
  assert found.result_bytes == result
  assert found.wire_bytes == LAYERS * sent


def test_a_group_of_one_sends_nothing():
  assert not compiled(lambda x: jax.lax.psum(x, "tensor"), 64)


FUSED = """\
%all-reduce-scatter (p: f32[8,6]) -> f32[2,6] {
  %p = f32[8,6]{1,0} parameter(0)
  %c = s32[] constant(0)
  %all-reduce.1 = f32[8,6]{1,0} all-reduce(%p), channel_id=1, replica_groups=[2,4]<=[8], to_apply=%add
  ROOT %ds = f32[2,6]{1,0} dynamic-slice(%all-reduce.1, %c, %c), dynamic_slice_sizes={2,6}
}

ENTRY %main (x: f32[8,6]) -> f32[2,6] {
  %x = f32[8,6]{1,0} parameter(0)
  ROOT %fusion.1 = f32[2,6]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter
}
"""


def test_the_reduce_scatter_that_xla_tpu_fuses_is_one():
  (found,) = collectives.find(hlo.parse(FUSED), SIZES)
  assert (found.kind, found.axes) == ("reduce-scatter", ("fsdp",))
  assert found.wire_bytes == 3 * 2 * 6 * 4


STARTED = """\
ENTRY %main (x: bf16[4,6]) -> bf16[16,6] {
  %x = bf16[4,6]{1,0} parameter(0)
  %start = (bf16[4,6]{1,0}, bf16[16,6]{1,0}) all-gather-start(%x), replica_groups=[2,4]<=[8], dimensions={0}
  ROOT %done = bf16[16,6]{1,0} all-gather-done(%start)
}
"""


def test_an_asynchronous_one_counts_its_result_alone():
  (found,) = collectives.find(hlo.parse(STARTED), SIZES)
  assert found.is_async
  assert found.result_bytes == 16 * 6 * 2


def fusion(name, inside):
  return f"""\
%{name} (p: bf16[4,6]) -> bf16[16,6] {{
  %p.{name} = bf16[4,6]{{1,0}} parameter(0)
  %all-gather.{name} = bf16[16,6]{{1,0}} all-gather(%p.{name}), channel_id=7, replica_groups=[2,4]<=[8], dimensions={{0}}
  ROOT {inside.replace("NAME", name)}
}}
"""


def test_the_fusions_that_go_on_with_one_do_not_count_it_again():
  start = (
    "%c.NAME = (bf16[16,6]{1,0}, u32[]{:S(2)}) custom-call(%all-gather.NAME), "
    'custom_call_target="AsyncCollectiveStart"'
  )
  done = (
    "%c.NAME = bf16[16,6]{1,0} custom-call(%all-gather.NAME), "
    'custom_call_target="AsyncCollectiveDone"'
  )
  more = "%c.NAME = bf16[16,6]{1,0} negate(%all-gather.NAME)"
  names = ("fused.1", "async_collective_fusion.2", "fused.3")
  computations = map(fusion, names, (start, more, done))
  calls = "\n".join(
    f"  %f.{i} = bf16[16,6]{{1,0}} fusion(%x), kind=kCustom, calls=%{name}"
    for i, name in enumerate(names)
  )
  entry = (
    "ENTRY %main (x: bf16[4,6]) -> bf16[16,6] {\n"
    f"  %x = bf16[4,6]{{1,0}} parameter(0)\n{calls}\n}}"
  )
  text = "\n".join([*computations, entry])
  (found,) = collectives.find(hlo.parse(text), SIZES)
  assert found.is_async
  assert found.result_bytes == 16 * 6 * 2


def test_alike_ones_are_added_up():
  found = compiled(
    lambda x: jax.lax.all_gather(jnp.tanh(jax.lax.psum(x, "data")), "fsdp").sum(
      0
    ),
    64,
  )
  rows = collectives.summarise([*found, *found])
  assert [(r.kind, r.count, r.runs) for r in rows] == [
    ("all-gather", 2, 2 * LAYERS),
    ("all-reduce", 2, 2 * LAYERS),
  ]
