"""Every test sees 8 CPU devices and rank promotion as an error."""

import atexit
import os
import shutil
import tempfile

if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
  # What one worker compiled, the others and their children find.
  # XLA_FLAGS and the processor are part of what it is found by, so programs
  # for other instructions do not get mixed up.
  cache = tempfile.mkdtemp(prefix="roc_tests_xla_")
  atexit.register(shutil.rmtree, cache, ignore_errors=True)
  os.environ |= {
    "JAX_COMPILATION_CACHE_DIR": cache,
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
  }
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
