"""Where compiled programs are kept, who decides it, and that a kept program is the program."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from dpo_jax import sharding
from dpo_jax.errors import UserError
from dpo_jax.run import compile_cache

PROGRAM = """
import json, sys
from dpo_jax.run import compile_cache
folder = compile_cache.use(sys.argv[1])
import jax, jax.numpy as jnp
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
events = []
jax.monitoring.register_event_listener(lambda name, **_: events.append(name))
value = jax.jit(lambda x: jnp.tanh(x @ x).sum())(jnp.arange(64.0).reshape(8, 8) / 64)
print(json.dumps([str(folder), float(value).hex(), sum("cache_hits" in name for name in events)]))
"""

MESH = sharding.make_mesh(devices=jax.devices()[:1])


def run(wanted, **changes):
    environment = {
        **os.environ,
        "JAX_ENABLE_COMPILATION_CACHE": "true",
        "PYTHONPATH": os.pathsep.join(sys.path),
        **changes,
    }
    done = subprocess.run([sys.executable, "-c", PROGRAM, wanted], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


def test_a_kept_program_is_found_again_and_a_damaged_one_is_made_again(tmp_path):
    (folder, value, hits), _ = run(str(tmp_path / "kept"))
    assert Path(folder) == tmp_path / "kept" / compile_cache.kind_of_host() and hits == 0
    (_, again, hits), _ = run(str(tmp_path / "kept"))
    assert again == value and hits > 0
    entries = [path for path in Path(folder).iterdir() if path.name.endswith("-cache")]
    for path in entries:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    (_, mended, hits), warnings = run(str(tmp_path / "kept"))
    assert mended == value and hits == 0 and "persistent compilation cache" in warnings


def test_who_decides(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    before = jax.config.values["jax_enable_compilation_cache"], jax.config.values["jax_compilation_cache_dir"]
    host = compile_cache.kind_of_host()
    try:
        jax.config.update("jax_enable_compilation_cache", True)
        assert compile_cache.folder_for("auto") == tmp_path / "caches" / "dpo_jax" / "compiled" / host
        assert compile_cache.folder_for(None) is None
        jax.config.update("jax_compilation_cache_dir", str(tmp_path / "told"))
        assert compile_cache.folder_for("auto") == tmp_path / "told"
        assert compile_cache.folder_for(str(tmp_path / "given")) == tmp_path / "given" / host
        jax.config.update("jax_enable_compilation_cache", False)
        assert compile_cache.folder_for("auto") is None and compile_cache.folder_for(str(tmp_path)) is None
    finally:
        jax.config.update("jax_enable_compilation_cache", before[0])
        jax.config.update("jax_compilation_cache_dir", before[1])


def test_a_folder_that_jax_was_told_to_use_is_left_as_it_is(tmp_path):
    """It may be shared with other programs, whose entries must not go."""
    value, _ = run("auto", JAX_COMPILATION_CACHE_DIR=str(tmp_path / "told"))
    assert value[0] == str(tmp_path / "told")
    assert not list((tmp_path / "told").glob(".lockfile"))


@pytest.mark.parametrize("workers", [1, 3])
def test_what_is_compiled_ahead_is_not_compiled_again(workers):
    double = sharding.Compiled(lambda x: 2 * x, MESH)
    kinds = [(jax.ShapeDtypeStruct((size,), jnp.float32),) for size in (3, 4, 5)]
    assert list(double.prepare(kinds, workers=workers)) == [1, 2, 3]
    for size in (5, 3, 4):
        assert double(jnp.ones(size)).tolist() == [2.0] * size
    assert double.recompilations == 0
    double(jnp.ones(6))
    assert double.recompilations == 1


@pytest.mark.parametrize("workers", [1, 3])
def test_what_cannot_be_compiled_is_said(workers):
    def refuse(x):
        if x.shape == (4,):
            raise ValueError("not four")
        return x

    kinds = [(jax.ShapeDtypeStruct((size,), jnp.float32),) for size in (3, 4, 5)]
    with pytest.raises(ValueError, match="not four"):
        list(sharding.Compiled(refuse, MESH).prepare(kinds, workers=workers))


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    before = jax.config.values["jax_enable_compilation_cache"]
    try:
        jax.config.update("jax_enable_compilation_cache", True)
        with pytest.raises(UserError, match=r"^model.compile_cache: .*file.* cannot be written to; .* or null$"):
            compile_cache.use(str(tmp_path / "file"))
    finally:
        jax.config.update("jax_enable_compilation_cache", before)


def test_processors_that_can_do_other_things_have_folders_of_their_own(tmp_path):
    texts = ("model name : A\nflags : avx2\n", "model name : A\nflags : avx2 avx512f\n")
    names = []
    for text in (*texts, texts[0] + "processor : 1\ncpu MHz : 7\n" + texts[0]):
        (tmp_path / "cpuinfo").write_text(text)
        names.append(compile_cache.kind_of_host(tmp_path / "cpuinfo"))
    assert names[0] != names[1] and names[2] == names[0]  # cores, and how fast they run just now, do not matter
