"""The kernels agree, and each is chosen only for what it can do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mole_jax.models import attention, remat
from mole_jax.parallel import activations, mesh


def random(*shape, seed=0, dtype="float32"):
  return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


@pytest.mark.parametrize("num_kv_heads", [2, 1])
@pytest.mark.parametrize("is_packed", [True, False])
def test_splash_attention_is_attention(num_kv_heads, is_packed):
  """In Pallas' interpreter, values and gradients."""
  batch, tokens, heads, width = 2, 256, 2, 128
  query = random(batch, tokens, heads, width)
  key = random(batch, tokens, num_kv_heads, width, seed=1)
  value = random(batch, tokens, num_kv_heads, width, seed=2)
  weights = random(batch, tokens, heads, width, seed=3)
  segments = mask = None
  if is_packed:
    segments = jnp.asarray(np.repeat([[1, 2, 2, 0], [1, 1, 1, 2]], 64, axis=1))
    mask = attention.causal_segment_mask(segments)

  def of_splash(*args):
    y = attention.splash(*args, segments, interpret=True)
    return (y * weights).sum(), y

  def of_xla(*args):
    y = attention.attend(*args, mask, is_causal=not is_packed)
    return (y * weights).sum(), y

  args = (query, key, value)
  got, got_y = jax.grad(of_splash, (0, 1, 2), has_aux=True)(*args)
  want, want_y = jax.grad(of_xla, (0, 1, 2), has_aux=True)(*args)
  np.testing.assert_allclose(got_y, want_y, atol=2e-6)
  for one, other in zip(got, want, strict=True):
    np.testing.assert_allclose(one, other, atol=1e-5)


CASES = {
  # platform, dtype, tokens, keys, head_dim, has a mask, segments -> kernel
  "gpu": ("gpu", "bfloat16", 64, 64, 128, True, True, "cudnn"),
  "gpu float32": ("gpu", "float32", 64, 64, 128, True, True, "xla"),
  "gpu tower": ("gpu", "bfloat16", 577, 577, 64, False, False, "cudnn"),
  "gpu odd and masked": ("gpu", "bfloat16", 63, 63, 64, True, True, "xla"),
  "gpu odd heads": ("gpu", "bfloat16", 64, 64, 36, True, True, "xla"),
  "gpu cache": ("gpu", "bfloat16", 1, 64, 128, True, False, "xla"),
  "tpu": ("tpu", "bfloat16", 256, 256, 128, True, True, "splash"),
  "tpu tower": ("tpu", "bfloat16", 577, 577, 64, False, False, "xla"),
  "tpu short": ("tpu", "bfloat16", 100, 100, 128, True, True, "xla"),
  "cpu": ("cpu", "float32", 256, 256, 128, True, True, "xla"),
}


def test_halves_of_a_head_are_swapped_alike_on_a_tpu(monkeypatch):
  """By a product with a permutation, to the last bit, forward and backward."""
  x = random(2, 5, 3, 8)
  angles = attention.rotary_angles(jnp.arange(10).reshape(2, 5), 8, 1e4)
  turn = lambda x: attention.rotate(x, *angles)
  want, pull = jax.vjp(turn, x)
  (want_dx,) = pull(x)
  monkeypatch.setattr(activations, "platform", lambda: "tpu")
  got, pull = jax.vjp(turn, x)
  np.testing.assert_array_equal(got, want)
  np.testing.assert_allclose(pull(x)[0], want_dx, atol=1e-6)


@pytest.mark.parametrize("kernel", ["cudnn", "xla"])
def test_only_what_a_kernel_does_not_keep_is_named(kernel, monkeypatch):
  monkeypatch.setattr(attention, "choose_kernel", lambda *_: kernel)
  attend = lambda query, *_, **__: query
  monkeypatch.setattr(jax.nn, "dot_product_attention", attend)
  x = random(1, 4, 2, 8)
  made = str(jax.make_jaxpr(lambda x: attention.attend(x, x, x, None))(x))
  assert ("attn_out" in made) == (kernel == "xla")
  assert all(f"name={n}" in made for n in ("query", "key", "value"))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_kernel_is_chosen_for_what_it_can_do(case, monkeypatch):
  platform, dtype, tokens, keys, head_dim, has_mask, has_segments, want = case
  monkeypatch.setattr(activations, "platform", lambda: platform)
  query = jnp.zeros((1, tokens, 2, head_dim), dtype)
  key = jnp.zeros((1, keys, 2, head_dim), dtype)
  assert attention.choose_kernel(query, key, has_mask, has_segments) == want


@pytest.mark.parametrize("is_causal, want", [(True, "blocks"), (False, "xla")])
def test_a_cpu_has_blocks_for_what_is_causal(is_causal, want):
  query, few = jnp.zeros((1, 8, 2, 4)), jnp.zeros((1, 1, 2, 4))
  choose = attention.choose_kernel
  assert choose(query, query, True, False, is_causal) == want
  assert choose(few, query, True, False, is_causal) == "xla"  # A cache.


# One block, several and a shorter last one, and blocks that grow with a row.
@pytest.mark.parametrize("tokens", [50, 300, 1100])
@pytest.mark.parametrize("has_segments", [False, True])
def test_blocks_are_exact_attention(tokens, has_segments):
  query, dy = (random(2, tokens, 4, 8, seed=i) for i in (0, 1))
  key, value = (random(2, tokens, 2, 8, seed=i) for i in (2, 3))
  ids = jnp.arange(tokens)[None] * 7 // tokens
  ids = jnp.concatenate([ids, ids // 3])  # The second ends with its third.
  mask = attention.causal_segment_mask(ids) if has_segments else None

  def ours(query, key, value):
    assert attention.choose_kernel(query, key, True, True, True) == "blocks"
    return attention.attend(
      query, key, value, mask, not has_segments, ids if has_segments else None
    )

  def theirs(query, key, value):
    return jax.nn.dot_product_attention(
      query,
      key,
      value,
      mask=None if mask is None else mask[:, None],
      is_causal=not has_segments,
    )

  got, pull = jax.vjp(ours, query, key, value)
  want, pull_want = jax.vjp(theirs, query, key, value)
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=2e-6)
  for one, other in zip(pull(dy), pull_want(dy), strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=2e-5)


def test_the_platform_is_that_of_the_mesh_that_is_traced():
  made = mesh.make_mesh(
    dict(data=-1, fsdp=1, expert=1, tensor=1), jax.devices()[:1]
  )
  seen = []
  function = lambda x: seen.append(activations.platform()) or x
  jax.jit(activations.on_mesh(function, made))(1.0)
  assert seen == ["cpu"]


def test_what_cudnn_calls_its_kernel_is_kept():
  """The policy goes by the primitives' names: they must be those of JAX."""
  fused = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
  names = {
    value.name
    for value in vars(fused).values()
    if isinstance(value, jax.extend.core.Primitive)
  }
  assert set(remat.CUDNN) <= names
