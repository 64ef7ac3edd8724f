"""The table of compiled steps, and the steps themselves: settings that `plan` takes, models that the decoder knows."""

import json

import pytest

from dpo_jax.config import run as config
from dpo_jax.hf.configs import read_spec
from dpo_jax.planning.chips import CHIPS
from tools.compiling import report
from tools.compiling.programs import MODELS, PROGRAMS


def record(name: str, launches: float | None, commit: str = "abc") -> dict:
    plan = {
        "batch": {"pairs": 256},
        "mesh": {"data": 1, "fsdp": 8},
        "model": {"remat": "attention", "attention": "cudnn"},
        "launches": launches,
        "waits": launches and 0.0,
        "time": {"products": 0.4, "memory": 0.1, "launches": 0.01, "attention": 0.0, "exposed": 0.0, "hidden": 0.2}
        | {"step": 0.51},
        "mfu": {"step": 0.5},
        "memory": {"predicted": {"all": 11 * 2**30}, "compiler": {"peak": 10 * 2**30}, "capacity": 80e9},
    }
    return {"kind": "compiled", "name": name, "commit": commit, "dirty": False, "plan": plan}


def test_the_newest_record_of_each_step_is_shown():
    text = report.table([record("8B, 8 H100", 9.0), record("8B, 64 v5p", None), record("8B, 8 H100", 5033.0, "def")])
    rows = text.splitlines()[2:]
    assert len(rows) == 2 and "5,033, 0" in rows[0] and "def" in rows[0] and "abc" in rows[1]
    assert "10.00, 11.00 GiB (+10 %)" in rows[0] and "50.0 %" in rows[0] and " yes " in rows[0]


@pytest.mark.parametrize("name", MODELS)
def test_models_are_ones_that_the_decoder_knows(tmp_path, name):
    (tmp_path / "config.json").write_text(json.dumps(MODELS[name]))
    assert len(read_spec(tmp_path).layers) == MODELS[name]["num_hidden_layers"]


@pytest.mark.parametrize("name", PROGRAMS)
def test_settings_are_ones_that_a_run_takes(name):
    program = PROGRAMS[name]
    config.load(["model.path=m", "data.train=d", "output=o", *program.settings], "plan")
    assert program.chip in CHIPS and program.model in MODELS
