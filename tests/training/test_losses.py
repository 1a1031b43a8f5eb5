"""The loss against a NumPy loop."""

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


@pytest.mark.parametrize("chunk_tokens", [1, 3, 7, 512])
def test_sums_by_domain_whatever_the_chunk(chunk_tokens):
  hidden, head, labels, domains = make()
  # A token's domain is that of the position that predicts it.
  found = losses.next_token_sums(
    jnp.asarray(hidden),
    jnp.asarray(labels),
    jnp.asarray(domains),
    lambda h: h @ head,
    3,
    chunk_tokens,
  )
  expected = numpy_sums(hidden, head, labels, domains)
  np.testing.assert_allclose(np.stack(found), expected, rtol=1e-5)
  assert expected[2].sum() > 0


def test_gradient_does_not_depend_on_the_chunk():
  hidden, head, labels, domains = make()

  def loss(hidden, chunk_tokens):
    return losses.next_token_sums(
      hidden,
      jnp.asarray(labels),
      jnp.asarray(domains),
      lambda h: h @ head,
      3,
      chunk_tokens,
    ).loss.sum()

  expected = jax.grad(loss)(jnp.asarray(hidden), 512)
  found = jax.grad(loss)(jnp.asarray(hidden), 2)
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
  assert jnp.all(expected[:, -1] == 0)


def test_tokens_take_the_domain_of_their_segment():
  segment_ids = jnp.asarray([[1, 1, 2, 0], [1, 0, 0, 0]])
  domains = jnp.asarray([[2, 0], [1, -1]])
  found = losses.token_domains(segment_ids, domains)
  np.testing.assert_array_equal(found, [[2, 2, 0, -1], [1, -1, -1, -1]])
