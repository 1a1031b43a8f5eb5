"""The loss against a NumPy loop."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mole_jax.training import losses


def make():
  rng = np.random.default_rng(0)
  hidden = rng.normal(size=(2, 7, 5)).astype(np.float32)
  head = rng.normal(size=(5, 11)).astype(np.float32)
  labels = rng.integers(0, 11, (2, 7))
  labels[rng.random((2, 7)) < 0.4] = losses.IGNORED
  domains = np.array([[0, 0, 0, 2, 2, 2, -1], [1] * 7])
  labels[domains < 0] = losses.IGNORED
  return hidden, head, labels, domains


def numpy_sums(hidden, head, labels, domains):
  sums = np.zeros((3, 3))
  for b in range(2):
    for t in range(6):
      target, domain = labels[b, t + 1], domains[b, t]
      if target == losses.IGNORED:
        continue
      logits = hidden[b, t].astype(np.float64) @ head
      loss = np.log(np.exp(logits).sum()) - logits[target]
      sums[:, domain] += [loss, logits.argmax() == target, 1]
  return sums


@pytest.mark.parametrize("is_head_frozen", [False, True])
@pytest.mark.parametrize("chunk_tokens", [1, 3, 7, 512])
def test_sums_by_domain_whatever_the_chunk(chunk_tokens, is_head_frozen):
  hidden, head, labels, domains = make()
  # A token's domain is that of the position that predicts it.
  found = losses.next_token_sums(
    jnp.asarray(hidden),
    jnp.asarray(labels),
    jnp.asarray(domains),
    lambda h: h @ head,
    3,
    chunk_tokens,
    is_head_frozen=is_head_frozen,
  )
  expected = numpy_sums(hidden, head, labels, domains)
  np.testing.assert_allclose(np.stack(found), expected, rtol=1e-5)
  assert expected[2].sum() > 0


def loss_of(hidden, chunk_tokens, is_head_frozen):
  """A loss that each domain counts differently in."""
  _, head, labels, domains = make()
  sums = losses.next_token_sums(
    hidden,
    jnp.asarray(labels),
    jnp.asarray(domains),
    lambda h: h @ head + 0.1,
    3,
    chunk_tokens,
    is_head_frozen=is_head_frozen,
  )
  return sums.loss @ jnp.arange(1.0, 4.0) / sums.count.sum()


@pytest.mark.parametrize("is_head_frozen", [False, True])
def test_gradient_depends_on_neither_chunk_nor_when_it_is_made(is_head_frozen):
  hidden = jnp.asarray(make()[0])
  expected = jax.grad(loss_of)(hidden, 512, False)
  value, found = jax.value_and_grad(loss_of)(hidden, 2, is_head_frozen)
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(value, loss_of(hidden, 512, False), rtol=1e-6)
  assert jnp.all(expected[:, -1] == 0)
  assert jnp.any(expected[:, :-1] != 0)


@pytest.mark.parametrize(
  ("is_head_frozen", "num_products"), [(False, 3), (True, 2)]
)
def test_under_a_frozen_head_logits_are_made_once(is_head_frozen, num_products):
  hidden = jnp.asarray(make()[0])
  step = jax.value_and_grad(loss_of)
  text = str(
    jax.make_jaxpr(step, static_argnums=(1, 2))(hidden, 7, is_head_frozen)
  )
  # Logits, hidden states' gradient, and the sums by domain, which are tiny.
  products = re.findall(r"f32\[2,7,(?:11|5)\] = dot_general", text)
  assert len(products) == num_products, text


@pytest.mark.parametrize(
  ("chunk_tokens", "wanted"), [(512, 7), (7, 7), (6, 4), (3, 3), (1, 1)]
)
def test_rows_are_padded_by_less_than_a_chunk_each(chunk_tokens, wanted):
  seen = set()

  def unembed(hidden):
    seen.add(hidden.shape[1])
    return hidden @ make()[1]

  hidden, _, labels, domains = map(jnp.asarray, make())
  losses.next_token_sums(hidden, labels, domains, unembed, 3, chunk_tokens)
  assert seen == {wanted}


def test_tokens_take_the_domain_of_their_segment():
  segment_ids = jnp.asarray([[1, 1, 2, 0], [1, 0, 0, 0]])
  domains = jnp.asarray([[2, 0], [1, -1]])
  found = losses.token_domains(segment_ids, domains)
  np.testing.assert_array_equal(found, [[2, 2, 0, -1], [1, -1, -1, -1]])
