"""A step that reads cached features is the one that reads pixels."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mole_jax.data import images
from mole_jax.models import vision
from mole_jax.parallel import mesh as mesh_lib
from mole_jax.training import features, loop, state, step
from mole_jax.training import stage as stage_lib
from tests.data import in_memory
from tests.training import small_run

BAD = ["general0", "document1", "biomedical2"]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
  return small_run.make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(autouse=True)
def squares(monkeypatch):
  """The squares of small_run, some broken, in place of the embedded sets."""
  in_memory.serve(
    monkeypatch,
    {
      f"embedded/{domain}": small_run.break_images(
        small_run.make_records(domain), BAD
      )
      for domain in small_run.DOMAINS
    },
  )


def make_config(setting="cached", **changes):
  config = small_run.make_config(**changes)
  config["data"] |= {"features": setting, "max_skipped": 0.5}
  return config


def make_stores(config, base, run, num_devices=1):
  stage = small_run.make_stage(config, "mole", num_devices)
  tower = stage.frozen_tower(config, base)
  stores = tower.stores(config["stages"]["mole"]["mixture"].values(), run)
  tower.make(stores)
  return stores


def gradients(config, base, text, stores, num_batches):
  """Loss and gradients of the first step on each of some batches."""
  devices = jax.devices()[:1]
  mesh = mesh_lib.make_mesh(config["mesh"], devices)
  stage = stage_lib.Stage(config, "mole", mesh)
  # Hands out the gradients as its new state.
  spy = optax.GradientTransformation(
    lambda params: jax.tree.map(jnp.zeros_like, params),
    lambda grads, _, params=None: (jax.tree.map(jnp.zeros_like, grads), grads),
  )
  train_step = step.make_train_step(
    stage.model_config,
    spy,
    lambda _: 0.0,
    balance=config["balance"]["loss"],
    balance_weight=config["balance"]["weight"],
    num_domains=3,
    num_segments=config["stages"]["mole"]["max_segments"],
    image_mean=config["data"]["image_mean"],
    image_std=config["data"]["image_std"],
    chunk_tokens=stage_lib.CHUNK_TOKENS,
    seed=0,
  )
  (trainable, _), frozen = stage.start(0, base)
  # Adapters start at zero, and with them most gradients.
  trainable = {
    name: leaf + 0.1 if "lora_b" in name else leaf
    for name, leaf in trainable.items()
  }
  loader = small_run.make_loader(config, "mole", text, BAD, stores)
  compiled = jax.jit(train_step)
  for number in range(num_batches):
    batch = loop.to_devices(loader.batch(number), stage.shardings["batch"])
    _, grads, values = compiled(
      trainable, frozen, spy.init(trainable), batch, 0
    )
    yield values, grads, values["num_failed"]


def test_loss_and_gradients_are_those_of_pixels(text, tmp_path):
  config = make_config()
  base = small_run.make_base(config)
  stores = make_stores(config, base, tmp_path)
  num_failed = 0
  for (cached, grads, failed), (pixels, expected, _) in zip(
    gradients(config, base, text, stores, 3),
    gradients(make_config("none"), base, text, None, 3),
    strict=True,
  ):
    num_failed += failed
    assert cached["loss"] == pytest.approx(float(pixels["loss"]), rel=1e-6)
    assert grads.keys() == expected.keys()
    for name, grad in grads.items():
      # Two programs sum in different orders. A step of one unit in the last
      # place of each feature moves a gradient by 2e-7 of its norm; the largest
      # of its entries' errors is a matter of the CPU's vector width, too.
      norm = np.linalg.norm(expected[name])
      assert norm > 0, name
      assert np.linalg.norm(grad - expected[name]) <= 1e-6 * norm, name
  assert num_failed  # Black images were seen too.


@pytest.mark.parametrize("num_devices", [1, 8])
def test_six_steps_have_the_losses_of_pixels(text, tmp_path, num_devices):
  config, plain = make_config(), make_config("none")
  if num_devices == 8:
    for each in (config, plain):
      each["mesh"] = dict(data=2, fsdp=2, expert=1, tensor=2)
      each["model"]["decoder"]["num_kv_heads"] = 2
  base = small_run.make_base(config)
  stores = make_stores(config, base, tmp_path, num_devices)
  run = lambda config, name, **kwargs: small_run.train(
    config, "mole", tmp_path / name, text, base, bad=BAD,
    num_devices=num_devices, **kwargs,
  )  # fmt: skip
  params, rows = run(config, "cached", stores=stores)
  base = small_run.make_base(config)  # Steps take memory of the other one.
  expected_params, expected = run(plain, "pixels")
  assert rows.keys() == expected.keys() == {2, 4, 6}
  for number, row in rows.items():
    for key in ("loss", "lm_loss", "balance_loss"):
      assert row[key] == pytest.approx(expected[number][key], rel=1e-6)
    for key in ("records", "num_failed", "padding_share"):
      assert row[key] == expected[number][key]
  # A stage that comes after it finds the tower.
  assert params.keys() == expected_params.keys()
  for name in filter(features.is_of_tower, params):
    np.testing.assert_array_equal(params[name], base[name])


def test_the_step_is_not_given_the_tower():
  config = make_config()
  stage = small_run.make_stage(config, "mole")
  assert stage.uses_features
  assert not any(map(features.is_of_tower, stage.frozen_shapes))
  assert stage.lower().as_text()
  assert any("vision" in group for group in stage.counts)
  other = small_run.make_stage(make_config("none"), "mole")
  assert not other.uses_features
  assert {*stage.frozen_shapes, *stage.tower_shapes} == {*other.frozen_shapes}


def test_bfloat16_features_are_the_towers(text, tmp_path):
  config = make_config()
  config["model"]["dtype"] = "bfloat16"
  base = small_run.make_base(config)
  (store, *_) = stores = make_stores(config, base, tmp_path)
  stage = small_run.make_stage(config, "mole")
  assert store.read(4, 1).dtype == np.uint16
  pixels = images.decode_image(
    small_run.make_records("general")[4]["images"][0], images.Preparation(8)
  )
  data = config["data"]
  x = step.normalise(
    jnp.asarray(pixels)[None, None],
    data["image_mean"],
    data["image_std"],
    "bfloat16",
  )
  params = state.unflatten({k: base[k] for k in stage.tower_shapes})
  expected = vision.VisionTower(stage.model_config.vision).apply(
    {"params": params["vision"]}, x[0]
  )
  assert expected.dtype == jnp.bfloat16
  found = step.restore(jnp.asarray(store.read(4, 1))[None], "bfloat16")[0]
  np.testing.assert_allclose(
    np.asarray(found, np.float32),
    np.asarray(expected, np.float32),
    rtol=2**-6,
    atol=2**-6,
  )
  ((cached, *_),) = gradients(config, base, text, stores, 1)
  plain = make_config("none")
  plain["model"]["dtype"] = "bfloat16"
  ((pixels, *_),) = gradients(plain, base, text, None, 1)
  assert cached["loss"] == pytest.approx(float(pixels["loss"]), rel=2**-7)


def folders(config, base, run):
  stage = small_run.make_stage(config, "mole")
  tower = stage.frozen_tower(config, base)
  lines = config["stages"]["mole"]["mixture"].values()
  return {store.folder for store in tower.stores(lines, run)}


def test_what_the_tower_is_and_is_given_decides_the_place(tmp_path):
  config = make_config()
  base = small_run.make_base(config)
  found = folders(config, base, tmp_path)
  assert len(found) == 3
  assert folders(make_config(), small_run.make_base(config), tmp_path) == found
  # One bit of one parameter.
  name = "vision/layers/fc1/bias"
  bits = np.array(base[name])
  bits.view(np.uint32).flat[0] ^= 1
  changed = {"a bit": (config, base | {name: jnp.asarray(bits)})}
  for section, key, value in [
    (
      "data",
      "image_mean",
      [0.4815, 0.4579, 0.4083],
    ),  # As background, the same.
    ("data", "image_std", [0.5, 0.5, 0.5]),
    ("data", "image_resample", "bilinear"),
    ("base", "dtype", "bfloat16"),
    ("model", "dtype", "bfloat16"),
  ]:
    other = make_config()
    other[section][key] = value
    changed[key] = (other, base)
  for key, value in [("feature_layer", -2), ("hidden_act", "gelu")]:
    other = make_config()
    other["model"]["vision"][key] = value
    changed[key] = (other, base)
  seen = set(found)
  for key, (other, parameters) in changed.items():
    places = folders(other, parameters, tmp_path)
    assert not places & seen, key
    seen |= places
  # What comes behind the tower changes nothing.
  other = make_config()
  other["model"]["mole"]["top_k"] = 2
  parameters = base | {"decoder/norm/scale": base["decoder/norm/scale"] + 1}
  assert folders(other, parameters, tmp_path) == found


def test_a_stage_that_trains_the_tower_reads_pixels():
  config = make_config()
  stage = small_run.make_stage(config, "base")
  assert not stage.uses_features
  assert stage.frozen_tower(config, None) is None
  assert features.why_pixels(config, "base", stage.trainable_shapes) == (
    "config.stages.base.trainable pattern '.*' trains 'vision/class_embedding'"
  )


def test_features_that_no_stage_can_read_are_refused():
  config = make_config()
  for stage in config["stages"].values():
    stage["trainable"] = [r"projector/.*", r"vision/layers/fc1/.*"]
  trainable = {
    name: small_run.make_stage(config, name).trainable_shapes
    for name in ("base", "mole")
  }
  with pytest.raises(ValueError) as error:
    features.check_useful(config, trainable)
  for part in (
    "config.data.features='cached'",
    "stages.mole.trainable pattern 'vision/layers/fc1/.*'",
    "--config.data.features=none",
  ):
    assert part in str(error.value)
  config["data"]["features"] = "none"
  features.check_useful(config, trainable)


def test_another_setting_is_refused():
  with pytest.raises(ValueError, match=r"'yes'; wanted one of \['none', 'cac"):
    small_run.make_stage(make_config("yes"), "mole")


def test_a_frozen_tower_needs_a_base():
  config = make_config()
  stage = small_run.make_stage(config, "mole")
  with pytest.raises(ValueError, match="freezes parameters that no base"):
    stage.frozen_tower(config, None)
