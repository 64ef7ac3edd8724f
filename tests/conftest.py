"""What every test stands on: four fake CPU devices, no compile cache, and arrays that never promote on their own.

And the tier of each test; tests/README.md says which law is tested where.
"""

import gc
import os
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # also for the processes that tests start

os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "false")  # nor do they keep or find compiled programs

os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_cpu_multi_thread_eigen=false "  # a core has its own pytest worker
    "--xla_cpu_parallel_codegen_split_count=1"
    # the older way to compile a fusion takes half of the time; jaxlib 0.12 has it no more, and ends at an unknown flag
    + (" --xla_cpu_use_fusion_emitters=false" if version("jaxlib") < "0.12" else ""),
)

os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")  # tests compile far longer than they compute

import hypothesis
import jax
import pytest

from tests.support import checked

checked.check()

hypothesis.settings.register_profile("busy", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("busy")  # what is tested is no stopwatch, and another worker may have the core

jax.config.update("jax_platforms", os.environ["JAX_PLATFORMS"])
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_enable_compilation_cache", False)
jax.config.update("jax_disable_most_optimizations", True)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

ROOT = Path(__file__).resolve().parents[1]
COMPILING = (
    "commands",
    "data/test_strangers.py",
    "data/test_workers.py",
    "evaluation",
    "hf/test_beside.py",
    "hf/test_every_family.py",
    "hf/test_export.py",
    "hf/test_export_memory.py",
    "hf/test_families.py",
    "hf/test_family_readers.py",
    "hf/test_hub_configs.py",
    "hf/test_hostile_sweep.py",
    "hf/test_quantised.py",
    "hf/test_quantised_refusals.py",
    "hf/test_resize.py",
    "hf/test_reward_export.py",
    "hf/test_verify.py",
    "hf/test_wrappers.py",
    "logprobs",
    "model",
    "objectives/test_objectives.py",
    "page",
    "planning",
    "preference",
    "python",
    "reporting/test_alarms.py",
    "run",
    "test_limits.py",
    "tools",
    "training",
)
"""Folders and files of this folder whose tests compile or start processes, or take long for another reason."""


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their marks
def pytest_collection_modifyitems(items):
    compiling = {path: _compiles(path.relative_to(ROOT / "tests")) for path in {item.path for item in items}}
    for item in items:
        if compiling[item.path]:
            item.add_marker("compiles")


def pytest_collection_finish():
    """What was imported to collect stays, and is not looked through again by each collection of garbage."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


def _compiles(place: Path) -> bool:
    return any(place.is_relative_to(part) for part in COMPILING)


@pytest.fixture(scope="module", autouse=True)
def _forget_what_was_compiled():
    """Each program that is compiled for a CPU keeps memory mapped, and a process that compiles thousands runs out. What
    a command sets for its process, the precision of products, is not left to the tests of the next module."""
    precision = jax.config.jax_default_matmul_precision
    yield
    jax.config.update("jax_default_matmul_precision", precision)
    jax.clear_caches()
    gc.collect()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference models and data that lies beside a full checkout."""
    for folder in (ROOT.parent / "shared", ROOT / "shared"):
        if folder.is_dir():
            return folder
    pytest.skip("needs the folder of reference models and data, which is not part of the repository")
