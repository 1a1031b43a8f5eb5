"""A stage of a config, made ready for a mesh, and the base it starts from."""

import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mole_jax.models import ffn, llava, moe
from mole_jax.parallel import mesh as mesh_lib
from mole_jax.parallel import sharding
from mole_jax.training import base as base_lib
from mole_jax.training import (
  features,
  flops,
  optim,
  quantised,
  state,
  step,
  upcycle,
)

# Positions whose logits exist at one time, in each row of a batch.
CHUNK_TOKENS = 512


class Stage:
  """A stage of the config, made ready for a mesh: shapes, step, shardings.

  Building it computes and allocates nothing, so that a recipe whose weights
  are not there can still be counted and lowered.
  """

  def __init__(
    self, config: Mapping[str, Any], name: str, mesh: jax.sharding.Mesh
  ):
    self.name = name
    self.mesh = mesh
    self.settings = config["stages"][name]
    self.model_config = state.model_config(config, name)
    self.model_config.decoder.check_length(
      self.settings["max_length"], f"config.stages.{name}.max_length"
    )
    mesh_lib.check_batch_size(self.settings["batch_size"], mesh)
    _check_cuts(self.model_config, mesh)
    shapes = state.parameter_shapes(self.model_config)
    trainable, frozen = state.split(shapes, self.settings["trainable"])
    base_dtype = config["base"]["dtype"]
    self.trainable_shapes = trainable
    self.uses_features = features.are_used(
      config["data"]["features"], trainable
    )
    # The frozen tower of a step that reads features is no part of it.
    self.tower_shapes: dict[str, jax.ShapeDtypeStruct] = {}
    self.frozen_shapes: dict[str, jax.ShapeDtypeStruct] = {}
    for key, leaf in frozen.items():
      is_apart = self.uses_features and features.is_of_tower(key)
      shapes_of = self.tower_shapes if is_apart else self.frozen_shapes
      shapes_of[key] = jax.ShapeDtypeStruct(leaf.shape, base_dtype)
    self.quantised = quantised.kernels(config, name)
    for key in self.quantised:
      leaf = self.frozen_shapes[key]
      self.frozen_shapes |= quantised.shapes(key, leaf.shape)
    self.counts = state.count_parameters(shapes, self.settings["trainable"])
    self.optimizer, schedule = optim.make_optimizer(
      self.settings["optim"], list(trainable), self.settings["num_steps"]
    )
    train_step = step.make_train_step(
      self.model_config,
      self.optimizer,
      schedule,
      balance=config["balance"]["loss"],
      balance_weight=config["balance"]["weight"],
      num_domains=len(config["data"]["domains"]),
      num_segments=self.settings["max_segments"],
      image_mean=config["data"]["image_mean"],
      image_std=config["data"]["image_std"],
      chunk_tokens=CHUNK_TOKENS,
      seed=config["seed"],
    )
    self.train_step, self.shardings = step.compile_step(
      train_step, self.optimizer, trainable, self.frozen_shapes, mesh
    )

  def state_shapes(self) -> state.TrainState:
    """Shapes and shardings of what a checkpoint of this stage holds."""
    opt = jax.eval_shape(self.optimizer.init, self.trainable_shapes)
    place = lambda leaf, sharding: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=sharding
    )
    return state.TrainState(
      jax.tree.map(place, self.trainable_shapes, self.shardings["trainable"]),
      jax.tree.map(place, opt, self.shardings["opt_state"]),
    )

  def flops_by_part(self) -> dict[str, float]:
    """FLOPs of a step by the published formula, see `flops`."""
    settings = self.settings
    return flops.step_flops_by_part(
      self.model_config,
      self.trainable_shapes,
      settings["batch_size"],
      settings["max_length"],
      settings["max_images"],
      uses_features=self.uses_features,
    )

  def exchange_plans(self) -> dict[int, moe.ExchangePlan]:
    """By number of experts, what layers with full experts do on the mesh."""
    config, settings = self.model_config, self.settings
    d = config.decoder
    shapes = ffn.linear_shapes(d.mlp, d.hidden_size, d.intermediate_size)
    kinds = moe.experts_by_layer(config.moe, d.num_layers)
    return {
      kind: moe.plan_exchange(
        config.moe,
        kind,
        settings["batch_size"] * settings["max_length"],
        d.hidden_size,
        sum(shape.fan_in * shape.fan_out for shape in shapes.values()),
        config.moe.capacity_factor,
        num_shards=mesh_lib.num_row_shards(self.mesh),
        axis_size=self.mesh.shape["expert"],
        item_bytes=jnp.dtype(config.dtype).itemsize,
      )
      for kind in sorted(set(kinds) - {0})
    }

  def lower(self) -> jax.stages.Lowered:
    """Lowers the step from shapes alone."""
    settings, shapes = self.settings, self.state_shapes()
    stored = step.stored_shape(self.model_config)
    batch = step.batch_shapes(
      batch_size=settings["batch_size"],
      max_length=settings["max_length"],
      max_images=settings["max_images"],
      max_segments=settings["max_segments"],
      image_size=self.model_config.vision.image_size,
      features=stored if self.uses_features else None,
    )
    return self.train_step.lower(
      shapes.trainable,
      self.frozen_shapes,
      shapes.opt_state,
      batch,
      jax.ShapeDtypeStruct((), np.int32),
    )

  def start(
    self, seed: int, base: state.Flat | None
  ) -> tuple[state.TrainState, state.Flat]:
    """First trainable state, and the frozen parameters, on the mesh.

    What the base does not hold (adapters; everything without a base) is
    initialised; what it holds in full and the stage in 8 bits is quantised.
    """
    base = base or {}
    self._check_frozen(base)
    whole = tuple(
      key for key in self.quantised if quantised.scale_of(key) not in base
    )
    make = quantised.maker(whole, self.shardings["frozen"])
    for key in whole:
      base = base | make(key, base[key])
    new = [name for name in self.trainable_shapes if name not in base]
    key = jax.random.key(seed)
    initialise = jax.jit(
      lambda key: state.initialise(self.model_config, key, new),
      out_shardings={n: self.shardings["trainable"][n] for n in new},
    )
    trainable = initialise(key)
    for name, leaf in self.trainable_shapes.items():
      if name in base:
        value = base[name].astype(leaf.dtype)
        place = self.shardings["trainable"][name]
        # A copy, which `device_put` alone need not make: the step donates its
        # trainable parameters, and the base may start another stage.
        trainable[name] = jnp.copy(jax.device_put(value, place))
    # In the order of the model, whatever came from where.
    trainable = {name: trainable[name] for name in self.trainable_shapes}
    frozen = {
      name: jax.device_put(
        base[name].astype(leaf.dtype), self.shardings["frozen"][name]
      )
      for name, leaf in self.frozen_shapes.items()
    }
    opt_state = jax.jit(
      self.optimizer.init, out_shardings=self.shardings["opt_state"]
    )(trainable)
    return state.TrainState(trainable, opt_state), frozen

  def frozen_tower(
    self, config: Mapping[str, Any], base: state.Flat | None
  ) -> features.FrozenTower | None:
    """What makes the features that this stage reads; None: it reads pixels."""
    if not self.uses_features:
      return None
    base = base or {}
    self._check_frozen(base)
    tower = {
      name: base[name].astype(leaf.dtype)
      for name, leaf in self.tower_shapes.items()
    }
    return features.FrozenTower(config, self.model_config, tower, self.mesh)

  def _check_frozen(self, base: state.Flat) -> None:
    scales = {*map(quantised.scale_of, self.quantised)}
    frozen = [*self.tower_shapes, *self.frozen_shapes]
    missing = [n for n in frozen if n not in base and n not in scales]
    if missing:
      raise ValueError(
        f"stage {self.name!r} freezes parameters that no base provides: "
        f"{missing[:5]}; add them to stages.{self.name}.trainable or name a "
        "base in config.base.path."
      )


def _check_cuts(config: llava.LlavaConfig, mesh: jax.sharding.Mesh) -> None:
  """Whole heads and whole experts on each device."""
  decoder = config.decoder
  heads = {
    "model.decoder.num_heads": decoder.num_heads,
    "model.decoder.num_kv_heads": decoder.num_kv_heads,
    "model.decoder.intermediate_size": decoder.intermediate_size,
  }
  mesh_lib.check_divides(mesh, "tensor", heads)
  experts = {"model.mole.num_experts": config.mole.num_experts}
  for number in moe.experts_by_layer(config.moe, decoder.num_layers):
    experts["model.moe.num_experts"] = number  # 0 is left alone.
    mesh_lib.check_divides(mesh, "expert", experts)


def load_base(
  stage: Stage, config: Mapping[str, Any], directory: pathlib.Path, sha256: str
) -> state.Flat:
  """Reads a base onto the mesh of a stage, verified by its hash.

  What the stage trains may be absent. A converted base may hold adapters, from
  which training goes on. Where the stage has experts and the base has none,
  they become copies of its FFNs. Kernels that the stage holds in 8 bits become
  so one by one. Raises ValueError where the base is not that of config.model.
  """
  make = quantised.maker(stage.quantised, stage.shardings["frozen"])
  reader = base_lib.BaseReader(directory, sha256)
  _check_settings(config["model"], reader)
  shapes = state.parameter_shapes(stage.model_config)
  places = sharding.parameter_shardings(shapes, stage.mesh)
  shapes = {
    name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=places[name])
    for name, leaf in shapes.items()
  }
  optional = stage.trainable_shapes
  if upcycle.is_needed(stage.model_config, reader):
    flat = upcycle.read(reader, stage.model_config, shapes, optional)
    upcycle.check_copies(flat)
    return flat
  return base_lib.read_base(directory, shapes, sha256, optional, make)


# What a user may choose anew for weights that stand: shapes stay the same.
_FREE_SETTINGS = {
  "vision": ("feature_layer",),
  "decoder": (),
  "lora": ("dropout",),
  "mole": ("dropout", "top_k", "gate", "dispatch", "block_rows"),
  "moe": (
    "top_k",
    "capacity_factor",
    "eval_capacity_factor",
    "capacity_groups",
    "use_gumbel_noise",
    "count_padding",
    "move",
    "block_rows",
  ),
}


def _check_settings(
  model: Mapping[str, Any], reader: base_lib.BaseReader
) -> None:
  """Compares what a converted base says of itself: shapes do not tell all."""
  about = reader.about.get("model", {})
  problems = []
  for section, free in _FREE_SETTINGS.items():
    if section in ("lora", "mole") and not _has_adapters(about, section):
      continue
    # Experts are copies of a base's FFNs where it has none.
    layers = about.get("moe", {}).get("layers", "none")
    if section == "moe" and layers == "none":
      continue
    if about.get("vision", {}).get("position_grid"):
      free = (*free, "image_size")  # Its positions are interpolated.
    problems += [
      f"{section}.{key} is {model[section][key]!r}, the base's {value!r}"
      for key, value in about.get(section, {}).items()
      if key not in free and model[section][key] != value
    ]
  if problems:
    raise ValueError(
      f"config.model is not that of the base in {reader.directory}:\n  "
      + "\n  ".join(problems)
      + f"\n--config=configs/mole3.py:{reader.directory} takes it from there "
      "(configs/lora.py for a base with plain LoRA)."
    )


def _has_adapters(model: Mapping[str, Any], section: str) -> bool:
  key = "rank" if section == "lora" else "num_experts"
  return section in model and model[section][key] > 0
