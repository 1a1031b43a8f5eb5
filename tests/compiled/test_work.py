"""FLOPs and traffic against programs whose work is known."""

import jax
import jax.numpy as jnp
import pytest

from mole_jax.compiled import hlo, work

LAYERS, ROWS, WIDTH = 5, 64, 32


def count(function, *shapes):
  shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
  compiled = jax.jit(function).lower(*shapes).compile()
  return work.count(hlo.parse(compiled.as_text())), compiled


def scanned(x, weights):
  return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]


def test_a_loop_counts_as_often_as_it_runs():
  found, compiled = count(scanned, (ROWS, WIDTH), (LAYERS, WIDTH, WIDTH))
  one = 2 * ROWS * WIDTH * WIDTH
  assert found.flops == LAYERS * one
  assert not found.unknown
  # The trap: XLA's own count has the body once (and tanh besides).
  assert compiled.cost_analysis()["flops"] < 1.5 * one


def test_a_scan_reads_each_layer_once():
  found, _ = count(scanned, (ROWS, WIDTH), (LAYERS, WIDTH, WIDTH))
  weights = 4 * LAYERS * WIDTH * WIDTH
  activations = 4 * LAYERS * ROWS * WIDTH
  # Slicing, product, tanh: each reads and writes once or twice, but none the
  # whole stack in each of its layers.
  assert weights <= found.hbm_bytes < 4 * (weights + 2 * activations)


@pytest.mark.parametrize("batched", [False, True])
def test_gradients_are_two_products_more(batched):
  shape = (3, ROWS, WIDTH) if batched else (ROWS, WIDTH)
  other = (3, WIDTH, WIDTH) if batched else (WIDTH, WIDTH)

  def loss(x, w):
    return jnp.sum(jnp.square(x @ w))

  found, _ = count(jax.grad(loss, argnums=(0, 1)), shape, other)
  one = 2 * ROWS * WIDTH * WIDTH * (3 if batched else 1)
  assert found.flops == 3 * one


def parse(line, operands):
  lines = [
    f"  %{name} = {kind} parameter({i})"
    for i, (name, kind) in enumerate(operands.items())
  ]
  body = "\n".join([*lines, f"  ROOT {line}"])
  return work.count(
    hlo.parse(f"ENTRY %main (x: f32[]) -> f32[] {{\n{body}\n}}")
  )


@pytest.mark.parametrize(
  ("line", "operands", "flops"),
  [
    # XLA:TPU's matrix product.
    (
      "%c = f32[8,16]{1,0} convolution(%a, %b), dim_labels=bf_io->bf",
      {"a": "bf16[8,4]{1,0}", "b": "bf16[4,16]{1,0}"},
      2 * 8 * 4 * 16,
    ),
    # Batched: XLA slides over a batch dimension; only the diagonal is real.
    (
      "%c = f32[3,8,16]{2,1,0} convolution(%a, %b), "
      "window={size=3 stride=2 pad=0_0 lhs_dilate=3}, dim_labels=0bf_0io->0bf",
      {"a": "bf16[3,8,4]{2,1,0}", "b": "bf16[3,4,16]{2,1,0}"},
      2 * 3 * 8 * 4 * 16,
    ),
    # A picture: every tap meets a pixel.
    (
      "%c = f32[2,4,4,7]{3,2,1,0} convolution(%a, %b), "
      "window={size=2x2 stride=2x2}, dim_labels=b01f_01io->b01f",
      {"a": "f32[2,8,8,3]{3,2,1,0}", "b": "f32[2,2,3,7]{3,2,1,0}"},
      2 * 2 * 4 * 4 * 7 * 2 * 2 * 3,
    ),
    (
      "%c = (bf16[8,16]{1,0}, s8[99]{0}) custom-call(%a, %b), "
      'custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config'
      '":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],'
      '"rhs_contracting_dimensions":["0"]}}}',
      {"a": "bf16[8,4]{1,0}", "b": "bf16[4,16]{1,0}"},
      2 * 8 * 4 * 16,
    ),
    (
      "%c = (bf16[2,6,9,64]{3,1,2,0}, u8[0]{0}) custom-call(%a), "
      'custom_call_target="__cudnn$fmhaSoftmax", backend_config={'
      '"intermediate_tensor_shape": {"element_type": "BF16", "dimensions": '
      '["2", "6", "9", "9"]}, "mask_type": "CAUSAL"}',
      {"a": "bf16[2,9,6,64]{3,2,1,0}"},
      2 * 2 * 2 * 6 * 9 * 9 * 64 / 2,
    ),
    (
      "%splash_mha_fwd_residuals.1 = (f32[512,128]{1,0}, bf16[6,256,64]{2,1,0})"
      ' custom-call(%a, %a, %a), custom_call_target="tpu_custom_call"',
      {"a": "bf16[6,256,64]{2,1,0}"},
      2 * 2 * 6 * 256 * 256 * 64 / 2,
    ),
  ],
)
def test_the_compilers_own_products_are_counted(line, operands, flops):
  found = parse(line, operands)
  assert found.flops == flops
  assert not found.unknown


def test_a_kernel_without_a_figure_is_named():
  line = '%k = f32[8]{0} custom-call(%a), custom_call_target="tpu_custom_call"'
  found = parse(line, {"a": "f32[8]{0}"})
  assert found.unknown == {"tpu_custom_call": 1}
  assert found.flops == 0


def test_a_kernel_with_an_estimate_is_counted_by_it():
  line = (
    '%k = f32[8]{0} custom-call(%a), custom_call_target="tpu_custom_call", '
    'backend_config={"custom_call_config":{"cost_estimate":{"flops":"70"}}}'
  )
  found = parse(line, {"a": "f32[8]{0}"})
  assert (found.flops, found.unknown) == (70, {})


def test_memory_on_the_chip_is_no_traffic():
  line = "%c = f32[8]{0:T(128)S(1)} add(%a, %b)"
  found = parse(line, {"a": "f32[8]{0:S(1)}", "b": "f32[8]{0}"})
  assert found.hbm_bytes == 32


@pytest.mark.parametrize(
  ("line", "moved"),
  [
    # Destination, source, context: 32 bytes read, none written.
    ("(f32[8]{0:S(1)}, f32[8]{0}, u32[]{:S(2)}) copy-start(%a)", 32),
    # Source first, of which a part is read.
    ("((f32[64]{0}), f32[8]{0:S(1)}, s32[]{:S(2)}) slice-start(%a)", 32),
    ("(f32[8]{0}, f32[8]{0:S(1)}, u32[]{:S(2)}) copy-start(%a)", 32),
  ],
)
def test_a_prefetch_reads_what_it_moves_beside_other_work(line, moved):
  found = parse(f"%c = {line}", {"a": "f32[64]{0}"})
  assert found.hbm_bytes == moved
  assert found.operations[-1].is_async


def test_cycles_of_a_loop_are_added_up_and_the_mark_for_none_is_left_out():
  config = 'backend_config={"window_config":{"estimated_cycles":"CYCLES"}}'
  kinds = {"a": "f32[8]{0}", "b": "f32[8]{0}"}
  line = f"%c = f32[8]{{0}} add(%a, %b), {config}"
  for cycles, found in ((100, 100), (2**63 - 1, 0)):
    text = line.replace("CYCLES", str(cycles))
    assert parse(text, kinds).cycles == found
