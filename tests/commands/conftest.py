"""Commands compile the same few programs in run after run; here they are kept, in a folder of this test process."""

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

KEPT = {"jax_enable_compilation_cache": True, "jax_persistent_cache_min_compile_time_secs": 0.0}


@pytest.fixture(scope="package", autouse=True)
def _keep_what_was_compiled(tmp_path_factory):
    given = KEPT | {"jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled"))}
    before = {name: jax.config.values[name] for name in given}
    for name, value in given.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
