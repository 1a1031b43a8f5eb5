from mole_jax.timing import real, synthetic
from tests.training import small_run


def test_without_its_data_a_config_says_what_is_not_there():
  config = small_run.make_config()
  config["data"]["tokenizer"] = "nowhere/tokenizer.json"
  stage = small_run.make_stage(config, "mole")
  weights = synthetic.parameters(stage)
  found = real.time_steps(config, stage, None, weights, 2)
  assert "nowhere/tokenizer.json" in found["not_there"]
  config["data"]["batching"] = "modality"
  found = real.time_steps(config, stage, None, weights, 2)
  assert "batches of several shapes" in found["not_there"]
