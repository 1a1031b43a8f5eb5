"""Each rule fires on what it forbids and on nothing else."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from mole_jax.compiled import checks, collectives, hlo

L, D, F, R, E, TOKENS = 4, 512, 2048, 16, 3, 1000
KERNEL = "decoder/layers/mlp/up_proj/kernel"
LORA = "decoder/layers/mlp/up_proj/lora_a"


def shape(*dims):
  return jax.ShapeDtypeStruct(dims, jnp.bfloat16)


EXPECTED = checks.Expected(
  trainable={
    LORA: shape(L, E, F, 4 * R),
    "projector/linear_1/kernel": shape(D, 5 * D),
  },
  frozen={KERNEL: shape(L, D, F), "decoder/embed_tokens": shape(9 * D, D)},
  mesh=dict(data=1, fsdp=2, expert=4, tensor=1),
  layers=L,
  experts=E,
  tokens=TOKENS,
  widths=(D, F),
)


def collective(kind, dims, axes=("fsdp",), ways=4, dtype="f32"):
  array = hlo.Array(dtype, dims)
  return collectives.Collective(
    kind, (array,), L, (L,), axes, ways, False, "jit(step)/mlp", "mole.py:1"
  )


@pytest.mark.parametrize(
  "one",
  [
    collective("all-gather", (1, D, F)),
    collective("all-gather", (D // 2, F)),  # Along one of two axes.
    collective("all-gather", (9 * D, D)),
    collective("all-reduce", (E, F, 4 * R)),  # A gradient,
    collective("all-reduce", (L, E, F, 4 * R)),  # stacked,
    collective("reduce-scatter", (D // 4, 5 * D), ways=4),  # in parts.
    collective("all-reduce", (D, F), axes=("tensor",)),  # Sums of activations.
    collective("all-reduce", (TOKENS, E)),  # Small.
    collective("all-to-all", (TOKENS, D)),
    # Cut along fsdp already.
    collective("all-reduce", (D // 2, 5 * D), axes=("expert",)),
  ],
)
def test_what_a_step_is_made_of_passes(one):
  assert checks.misplaced([one], EXPECTED) == []


@pytest.mark.parametrize(
  ("one", "rule"),
  [
    (collective("all-reduce", (1, D, F)), "all-reduce of weight"),
    (collective("reduce-scatter", (D // 4, F)), "reduce-scatter of activ"),
    (collective("all-reduce", (TOKENS, F)), "all-reduce of activation?"),
    # No axis cuts the projector in three.
    (collective("all-reduce", (D // 3, 5 * D)), "all-reduce of activation?"),
    (collective("all-gather", (TOKENS, F)), "all-gather of activation?"),
    (collective("all-gather", (L, D, F)), "all-gather of several layers"),
  ],
)
def test_what_it_must_not_do_is_named(one, rule):
  (finding,) = checks.misplaced([one], EXPECTED)
  assert finding.rule.startswith(rule)
  assert "in a loop of 4: jit(step)/mlp mole.py:1" in finding.message


@pytest.mark.parametrize(("width", "is_wrong"), [(F, True), (F // 2, False)])
def test_a_frozen_weights_gradient_is_found(width, is_wrong):
  def function(x, dy):
    return x.T @ dy

  shapes = [jax.ShapeDtypeStruct((TOKENS, n), jnp.float32) for n in (D, width)]
  text = jax.jit(function).lower(*shapes).compile().as_text()
  found = checks.frozen_gradients(hlo.parse(text), EXPECTED)
  assert [KERNEL in finding.message for finding in found] == [True] * is_wrong


@pytest.mark.parametrize(
  ("dims", "is_wrong"),
  [
    (f"{TOKENS},{E},{D}", True),
    (f"{E},{TOKENS},{F}", True),
    (f"2,{TOKENS // 2},{E},4,{D // 4}", True),  # Rows; heads.
    (f"{E},{TOKENS // 4},{4 * D}", False),  # As many rows as experts.
    (f"4,{E},{TOKENS},{D}", False),  # Layers, at a quarter of F.
    (f"{TOKENS},{E * R}", False),  # Rank space.
    (f"{TOKENS},{3 * D}", False),
    (f"{TOKENS},{E}", False),
  ],
)
def test_experts_by_tokens_by_width_is_found(dims, is_wrong):
  text = f"""\
ENTRY %main (x: f32[{dims}]) -> f32[{dims}] {{
  %x = f32[{dims}]{{0}} parameter(0)
  ROOT %y = f32[{dims}]{{0}} add(%x, %x)
}}"""
  found = checks.expert_buffers(hlo.parse(text), EXPECTED)
  assert bool(found) == is_wrong


def test_saved_inputs_of_layers_are_no_expert_buffers():
  text = f"""\
ENTRY %main (x: f32[{E},{TOKENS},{D}]) -> f32[{E},{TOKENS},{D}] {{
  ROOT %x = f32[{E},{TOKENS},{D}]{{0}} parameter(0)
}}"""
  alike = dataclasses.replace(EXPECTED, layers=E)
  assert checks.expert_buffers(hlo.parse(text), EXPECTED)
  assert not checks.expert_buffers(hlo.parse(text), alike)
