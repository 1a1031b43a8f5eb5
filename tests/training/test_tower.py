"""A stage that reads features of its frozen tower instead of pixels."""

import numpy as np
import pytest

from mole_jax.data.builders.prepared.build import build
from mole_jax.training import feed, loop, tower
from tests.data.builders import prepared_input
from tests.training import small_run


@pytest.fixture(scope="module")
def text(tmp_path_factory):
  return small_run.make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def built(tmp_path_factory):
  folder = tmp_path_factory.mktemp("data")
  file, pictures, _ = prepared_input.sample_input(folder, count=25)
  build(file, pictures, name="general", out=folder)
  return str(folder / "general")


@pytest.fixture
def config(built):
  config = small_run.make_config()
  line = {"name": built, "split": "train", "format": "chat", "weight": 1.0}
  config["stages"]["mole"]["mixture"] = {"own": line}
  config["data"]["features"] = "cached"
  return config


def open_stores(config, base):
  return tower.open_stores(config, "mole", base, lambda *progress: None)


def train(config, text, base, run, stores):
  rows = {}
  stage = small_run.make_stage(config, "mole")
  image_tokens = stage.model_config.num_image_tokens
  loader = feed.make_loader(config, "mole", text, image_tokens, stores=stores)
  params = loop.run_stage(
    config, stage, loader, run, base, None,
    on_log=rows.__setitem__, on_step=lambda number: None,
  )  # fmt: skip
  return params, rows, loader


def test_training_is_the_same_as_with_pixels(config, text, tmp_path):
  base = small_run.make_base(config)
  pixels, rows, loader = train(config, text, base, tmp_path / "a", None)
  assert "images" in loader.batch(0)
  stores = open_stores(config, base)
  cached, cached_rows, loader = train(
    config, text, base, tmp_path / "b", stores
  )
  assert "features" in loader.batch(0) and "images" not in loader.batch(0)
  for step, row in rows.items():
    assert cached_rows[step]["loss"] == pytest.approx(row["loss"], rel=1e-6)
  moved = 0
  for name, value in pixels.items():
    np.testing.assert_allclose(cached[name], value, rtol=2e-4, atol=2e-6)
    moved += name in base and bool((value != base[name]).any())
  assert moved  # The projector, which sees the features, has learnt.


def test_another_tower_or_preparation_has_another_store(config):
  base = small_run.make_base(config)
  (first,) = open_stores(config, base)
  assert open_stores(config, base)[0].folder == first.folder
  name = next(n for n in base if n.startswith("vision/"))
  other = {**base, name: base[name].at[..., 0].add(1e-3)}
  folders = {first.folder, open_stores(config, other)[0].folder}
  for key, value in [
    ("image_mean", (0.5, 0.25, 0.75)),
    ("image_resample", "bilinear"),
    ("image_std", (0.5, 0.5, 0.5)),
  ]:
    changed = {**config, "data": {**config["data"], key: value}}
    folders.add(open_stores(changed, base)[0].folder)
  assert len(folders) == 5
  # What the tower is not does not count.
  other = {
    **base,
    "projector/linear_1/bias": base["projector/linear_1/bias"] + 1,
  }
  assert open_stores(config, other)[0].folder == first.folder


def test_a_stage_that_trains_its_tower_reads_pixels(config):
  assert tower.is_cached(config, {"projector/linear_1/kernel": 0})
  assert not tower.is_cached(config, {"vision/patch_embed/kernel": 0})
  config["data"]["features"] = "none"
  assert not tower.is_cached(config, {"projector/linear_1/kernel": 0})
  config["data"]["features"] = "chached"
  with pytest.raises(ValueError, match="features='chached'; wanted one of"):
    tower.is_cached(config, {})
