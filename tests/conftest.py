"""Every test: CPU, eight fake devices, strict shapes and types."""

import atexit
import os
import pathlib
import shutil
import tempfile

# Before jax is imported.
os.environ["JAX_PLATFORMS"] = "cpu"
# Most of a test's time is compilation: a quarter less without optimisation, a
# third less again without the newer code generator.
FLAGS = (
  "--xla_backend_optimization_level=0",
  "--xla_llvm_disable_expensive_passes=true",
  "--xla_cpu_use_fusion_emitters=false",
)
os.environ["XLA_FLAGS"] = " ".join(
  [
    os.environ.get("XLA_FLAGS", ""),
    *FLAGS,
    "--xla_force_host_platform_device_count=8",
  ]
)
os.environ.setdefault("MPLBACKEND", "Agg")
# Tests compile the same small programs again and again, in the workers of
# pytest-xdist and in the commands they run: all inherit one cache.
if "PYTEST_XDIST_WORKER" not in os.environ:
  CACHE = tempfile.mkdtemp(prefix="mole_jax-test-compilation-")
  atexit.register(shutil.rmtree, CACHE, ignore_errors=True)
  os.environ["JAX_COMPILATION_CACHE_DIR"] = CACHE
  os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
  os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
  # Transformers copies modeling files there; it asks no hub for anything.
  os.environ["HF_HOME"] = str(pathlib.Path(CACHE) / "huggingface")
  os.environ["HF_HUB_OFFLINE"] = "1"

import jax  # noqa: E402
import jaxtyping  # noqa: E402
from absl import flags  # noqa: E402

# Annotations of the package become checks, in the tests only.
jaxtyping.install_import_hook("mole_jax", "beartype.beartype")
jax.config.update("jax_numpy_rank_promotion", "raise")
flags.FLAGS.mark_as_parsed()
