"""What the loop promises: resume bitwise, frozen stays, nothing is lost."""

import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mole_jax.data import images, templates
from mole_jax.training import (
  checkpoint,
  feed,
  host_memory,
  loop,
  metrics,
  state,
)
from tests.training import small_run


@pytest.fixture(scope="module")
def text(tmp_path_factory):
  return small_run.make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def assert_same(one, other):
  assert one.keys() == other.keys()
  for name in one:
    np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def test_pictures_are_prepared_as_the_config_says(text, monkeypatch):
  config = small_run.make_config()
  changes = {"image_mean": (0.5, 0.25, 0.75), "image_resample": "bilinear"}
  config["data"] |= changes
  datasets = small_run.make_loader(config, "mole", text).datasets
  monkeypatch.setattr(
    feed.mixture, "load_mixture", lambda *args, **kwargs: datasets
  )
  loader = feed.make_loader(config, "mole", text, 6)
  found = loader._assembler.samples.preparation
  assert found == images.Preparation(8, (127, 63, 191), "bilinear")


def test_chats_are_written_as_the_config_says(text, monkeypatch):
  config = small_run.make_config()
  datasets = small_run.make_loader(config, "mole", text).datasets
  given = []
  monkeypatch.setattr(
    feed.mixture,
    "load_mixture",
    lambda sources, make_encoder, **kwargs: (
      given.append(make_encoder("chat").template) or datasets
    ),
  )
  feed.make_loader(config, "mole", text, 6)
  config["data"]["template"] = "tokenizer"
  path = text.path.with_name("chat_template.jinja")
  path.write_text("{% for m in messages %}{{ m.content }}</s>{% endfor %}")
  feed.make_loader(config, "mole", text, 6)
  path.unlink()
  assert given[0] is templates.VICUNA
  assert templates.answer_ids(given[1], text, "a") == [*text.encode("a"), 2]


@pytest.mark.parametrize("name", ["base", "mole"])
def test_six_steps_equal_three_a_stop_and_three(name, text, tmp_path):
  config = small_run.make_config()
  base = small_run.make_base(config) if name == "mole" else None
  whole, rows = small_run.train(config, name, tmp_path / "a", text, base)
  small_run.train(config, name, tmp_path / "b", text, base, last_step=3)
  assert checkpoint.list_steps(tmp_path / "b", name) == [3]
  resumed, later = small_run.train(config, name, tmp_path / "b", text, base)
  assert_same(whole, resumed)
  assert rows[6]["loss"] == later[6]["loss"]
  assert min(later) == 4


def test_frozen_parameters_are_bitwise_unchanged_and_the_others_move(
  text, tmp_path
):
  config = small_run.make_config()
  base = small_run.make_base(config)
  before = jax.tree.map(np.array, base)
  after, _ = small_run.train(config, "mole", tmp_path, text, base)
  patterns = config["stages"]["mole"]["trainable"]
  trainable = state.is_trainable(list(after), patterns)
  for name, is_trained in trainable.items():
    if not is_trained:
      np.testing.assert_array_equal(after[name], before[name], err_msg=name)
    elif name in before:
      assert np.any(np.asarray(after[name]) != before[name]), name
  assert not trainable["decoder/layers/mlp/gate_proj/kernel"]
  assert jnp.any(after["decoder/layers/mlp/gate_proj/lora_b"] != 0)


def test_training_learns(text, tmp_path):
  config = small_run.make_config(num_steps=60)
  config["stages"]["base"]["optim"]["lr"] = 1e-2
  _, rows = small_run.train(config, "base", tmp_path, text)
  assert rows[60]["loss"] < 0.5 * rows[2]["loss"]


@pytest.mark.parametrize("num_devices", [1, 2])
def test_a_step_compiles_once_and_its_heap_is_gone_before_it_runs(
  num_devices, text, tmp_path, monkeypatch
):
  config = small_run.make_config(num_steps=2)
  config["mesh"]["data"] = num_devices
  happened = []
  monkeypatch.setattr(
    host_memory, "give_back", lambda: happened.append("give back")
  )

  def listen(event, duration, *, fun_name="", **kwargs):
    if event.endswith("backend_compile_duration") and "train_step" in fun_name:
      happened.append("compile")

  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    small_run.train(
      config, "mole", tmp_path, text, small_run.make_base(config),
      num_devices=num_devices, on_step=happened.append,
    )  # fmt: skip
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)
  assert happened == ["compile", "give back", 1, 2]


def test_a_non_finite_loss_names_the_step_and_spares_the_checkpoint(
  text, tmp_path
):
  config = small_run.make_config()
  small_run.train(config, "base", tmp_path, text, last_step=3)
  good = checkpoint.list_steps(tmp_path, "base")
  # Explodes in the first step after the checkpoint.
  config["stages"]["base"]["optim"]["lr"] = 1e38
  config["stages"]["base"]["optim"]["eps"] = 0.0
  with pytest.raises(metrics.NonFiniteLossError, match="at step 5") as error:
    small_run.train(config, "base", tmp_path, text)
  assert error.value.step == 5
  assert checkpoint.list_steps(tmp_path, "base") == good == [3]


def test_a_non_finite_gradient_leaves_parameters_untouched(text):
  config = small_run.make_config()
  stage = small_run.make_stage(config, "base")
  (trainable, opt_state), frozen = stage.start(0, None)
  trainable["decoder/norm/scale"] = jnp.full(16, jnp.nan)
  before = jax.tree.map(np.array, (trainable, opt_state))
  batch = small_run.make_loader(config, "base", text).batch(0)
  batch = loop.to_devices(batch, stage.shardings["batch"])
  new, new_opt, values = stage.train_step(
    trainable, frozen, opt_state, batch, np.int32(0)
  )
  assert not values["is_finite"]
  jax.tree.map(np.testing.assert_array_equal, (new, new_opt), before)


def test_padding_is_counted_of_rows_as_long_as_they_are(text):
  """Batches of grouped samples are cut: shorter than max_length."""
  config = small_run.make_config()
  stage = small_run.make_stage(config, "base")
  (trainable, opt_state), frozen = stage.start(0, None)
  batch = small_run.make_loader(config, "base", text).batch(0)
  names = ("input_ids", "labels", "positions", "segment_ids")
  batch |= {name: batch[name][:, :48] for name in names}
  sent = loop.to_devices(batch, stage.shardings["batch"])
  *_, values = stage.train_step(trainable, frozen, opt_state, sent, np.int32(0))
  window = metrics.Window(config["data"]["domains"])
  window.add(jax.device_get(values))
  num_tokens = (batch["segment_ids"] > 0).sum()
  padding = window.summary(1.0)["padding_share"]
  assert padding == pytest.approx(1 - num_tokens / (4 * 48))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_the_rerun_goes_on(number, text, tmp_path):
  config = small_run.make_config()
  whole, _ = small_run.train(config, "base", tmp_path / "a", text)

  def send(step):
    if step == 2:
      os.kill(os.getpid(), number)

  with pytest.raises(loop.StoppedError) as error:
    small_run.train(config, "base", tmp_path / "b", text, on_step=send)
  assert error.value.saved_step in checkpoint.list_steps(tmp_path / "b", "base")
  assert error.value.saved_step < 6
  resumed, _ = small_run.train(config, "base", tmp_path / "b", text)
  assert_same(whole, resumed)


def test_metrics_have_one_line_a_window_even_after_a_resume(text, tmp_path):
  config = small_run.make_config()
  base = small_run.make_base(config)
  small_run.train(config, "mole", tmp_path, text, base, last_step=5)
  # As if the run had been killed after step 5, but saved only step 3.
  small_run.train(config, "mole", tmp_path, text, base)
  path = tmp_path / "mole" / "metrics.jsonl"
  rows = [json.loads(line) for line in path.read_text().splitlines()]
  assert [row["step"] for row in rows] == [2, 4, 5, 6]
  row = rows[0]
  assert np.shape(row["expert_load"]) == (2, 3)
  np.testing.assert_allclose(np.sum(row["expert_load"], axis=1), 1, rtol=1e-5)
  assert all(0 < value <= np.log(3) + 1e-6 for value in row["router_entropy"])
  assert row["loss"] == pytest.approx(
    row["lm_loss"] + 1e-2 * row["balance_loss"], rel=1e-5
  )
  assert set(row["domain_loss"]) == set(small_run.DOMAINS)
  assert 0 <= row["padding_share"] < 1
  assert list((tmp_path / "mole" / "tensorboard").glob("events*"))


def test_a_stage_that_freezes_what_no_base_gives_is_refused():
  config = small_run.make_config()
  stage = small_run.make_stage(config, "mole")
  with pytest.raises(ValueError, match="freezes parameters that no base"):
    stage.start(0, None)
