"""The recipes of configs/: each says the same things of itself, is right, and runs on a model and data of its shape."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import jax
import pytest

from dpo_jax import recipes, train
from dpo_jax.config import run as config
from dpo_jax.files import configs_folder
from dpo_jax.planning.chips import CHIPS
from dpo_jax.reporting.journal import read_records
from dpo_jax.settings import GivenSettings
from tests.conftest import ROOT
from tests.support.tiny_folders import write_folder
from tests.support.tiny_rows import CHATML, assistant, byte_tokenizer, user, write

OWN = {"quickstart", "quickstart_reward", "rounds", "smollm2_135m_hh", "smollm2_135m_lora_hh"}
"""Recipes of small runs that were made here whole, on CPU cores; all others are of published runs."""
PUBLISHED = sorted(set(recipes.names()) - OWN)


# ---------------------------------------------------------------------------------------------- what they say


@pytest.mark.parametrize("name", recipes.names())
def test_a_header_says_where_a_run_is_from_what_it_needs_and_what_was_run_here(name):
    found = recipes.recipe(name)
    assert found.about.endswith(".") and {"from", "hardware", "here"} <= found.facts.keys()
    assert list(found.facts) == [fact for fact in recipes.FACTS if fact in found.facts]
    assert all(found.facts.values())
    assert all(len(line) <= 120 for line in found.text.splitlines())


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_run_is_short_and_planned(name):
    found = recipes.recipe(name)
    lines = [line for line in found.text.splitlines() if line and not line.startswith("#")]
    assert len(lines) <= 12
    number, _, title = found.facts["hardware"].partition(" x ")
    assert int(number) > 0 and title in [chip.title for chip in CHIPS.values()]
    assert re.search(r"GiB a device .* steps of .* (hours|minutes|seconds) at best \(jax [\d.]+\)", found.facts["plan"])
    run = config.load([str(configs_folder() / f"{name}.yaml")])
    assert run.output == f"runs/{name}"


def test_the_list_and_a_recipe_are_printed(capsys):
    assert recipes.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == recipes.names()
    assert re.split("  +", next(line for line in lines if line.startswith("tulu3")))[1] == "8 x H100 SXM"
    assert recipes.main(["configs/tulu3_8b_dpo.yaml"]) == 0
    assert capsys.readouterr().out == (ROOT / "configs/tulu3_8b_dpo.yaml").read_text()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["tulu3_8b"], "did you mean tulu3_8b_dpo?"),
        (["../pyproject"], "no recipe of this name"),
        (["--copy"], "which recipe?"),
    ],
)
def test_what_is_no_recipe_is_refused_in_a_line(argv, words, capsys):
    assert recipes.main(argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line


# ---------------------------------------------------------------------------------------------- copies


def test_a_copy_has_all_that_its_run_reads_and_spoils_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert recipes.main(["quickstart", "--copy"]) == 0
    written = capsys.readouterr().out.splitlines()
    assert written == [str(path.relative_to(tmp_path)) for path in map(tmp_path.joinpath, written) if path.is_file()]
    run = config.load(["configs/quickstart.yaml"])
    assert all(Path(path).exists() for path in (run.model.path, run.data.train, run.data.eval, run.evaluation.answers))
    assert recipes.main(["quickstart", "--copy"]) == 0  # the same again is no harm
    Path("configs/quickstart/train.jsonl").write_text("mine")
    Path("configs/quickstart.yaml").unlink()
    assert recipes.main(["quickstart", "--copy"]) == 2
    assert "train.jsonl: is there already" in capsys.readouterr().err
    assert Path("configs/quickstart/train.jsonl").read_text() == "mine" and not Path("configs/quickstart.yaml").exists()


@pytest.mark.parametrize("name", recipes.names())
def test_every_file_of_configs_that_a_recipe_names_is_there(name):
    given, there = GivenSettings(), recipes.files(name)
    given.read(str(ROOT / f"configs/{name}.yaml"))
    named = [value for value in given.values.values() if str(value).startswith("configs/")]
    assert all(any(path == value or path.startswith(f"{value}/") for path in there) for value in named)
    assert len(there) > len(set(named))  # the recipe itself, and a file or more for each
    assert all((ROOT / path).read_bytes() == content for path, content in there.items())


def test_an_installed_package_has_every_folder_and_the_recipes():
    """What setuptools is told by name is all that there is; configs/ goes along as dpo_jax/configs."""
    told = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "dpo_jax").rglob("__init__.py")}
    assert set(told["packages"]) == {*folders, "dpo_jax.configs"}
    assert told["package-dir"] == {"dpo_jax.configs": "configs"}
    taken = {path for form in told["package-data"]["dpo_jax.configs"] for path in (ROOT / "configs").glob(form)}
    assert {path for path in (ROOT / "configs").rglob("*") if path.is_file()} <= taken


@pytest.mark.nightly
def test_a_wheel_lists_its_recipes_where_no_checkout_is(tmp_path):
    pytest.importorskip("setuptools", minversion="77", reason="pyproject.toml asks for it, to build")
    tree = tmp_path / "tree"
    for path in [ROOT / "pyproject.toml", ROOT / "README.md", ROOT / "LICENSE", *_files("dpo_jax"), *_files("configs")]:
        target = tree / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    build = "import sys, setuptools.build_meta as b; b.build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, str(tmp_path)], cwd=tree, check=True, capture_output=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    subprocess.run([sys.executable, "-m", "zipfile", "-e", str(wheel), str(tmp_path / "site")], check=True, timeout=60)
    command = [sys.executable, "-m", "dpo_jax.recipes"]
    away = {"cwd": tmp_path, "env": {"PYTHONPATH": str(tmp_path / "site")}, "capture_output": True, "timeout": 60}
    listed = subprocess.run(command, check=True, **away).stdout.decode().splitlines()
    assert [line.split()[0] for line in listed] == recipes.names()
    subprocess.run([*command, "opt350m_qlora_toy", "--copy"], check=True, **away)
    assert (tmp_path / "configs/plain.jinja").read_bytes() == (ROOT / "configs/plain.jinja").read_bytes()


def _files(folder: str) -> list[Path]:
    return [path for path in (ROOT / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts]


# ---------------------------------------------------------------------------------------------- small runs

PHI = {"intermediate_size": 48, "partial_rotary_factor": 0.5, "rms_norm_eps": ..., "layer_norm_eps": 1e-5}
LEARNED = dict.fromkeys(("num_key_value_heads", "rope_parameters", "rms_norm_eps", "intermediate_size"), ...)
OPT = {"ffn_dim": 64, "word_embed_proj_dim": 16, "do_layer_norm_before": False, **LEARNED}  # as in opt-350m
SHAPES = {
    "llama": {},
    "mistral": {"sliding_window": 16},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"tie_word_embeddings": True, "head_dim": 8},
    "phi": PHI,
    "opt": OPT,
}
THINKING = CHATML.removesuffix("{% endif %}") + (
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
"""As Qwen3's: an answer that is not to think begins with an empty thought."""
NO_TEMPLATE = {"Mistral-7B-v0.1", "phi-2", "opt-350m"}
"""Models of the recipes whose tokenizer has no chat template."""


def ultrafeedback(n: int) -> dict:
    """As trl-lib/ultrafeedback_binarized: whole conversations and no prompt."""
    talks = {name: [user(f"What is {n}?"), assistant(text)] for name, text in {"chosen": "n", "rejected": "no"}.items()}
    return {**talks, "score_chosen": 8.0, "score_rejected": 4.5}


def with_prompt(n: int) -> dict:
    """As HuggingFaceH4/ultrafeedback_binarized, princeton-nlp's and Tulu's sets: a prompt beside them."""
    found = ultrafeedback(n)
    more = {"all_generated_responses": ["n", "no"], "scores": [0.4, 0.1], "chosen-rating": 5.0, "source": "made"}
    return {"prompt": f"What is {n}?", "prompt_id": f"{n:x}", **found, "messages": found["chosen"], **more}


def orca(n: int) -> dict:
    """As argilla/distilabel-intel-orca-dpo-pairs."""
    row = {
        "system": "Be short." * (n % 2),
        "input": f"What is {n}?",
        "chosen": f"{n}.",
        "rejected": "No.",
        "rating": [9, 8],
    }
    return {**row, "generations": [f"{n}.", "No."], "status": "unchanged", "in_gsm8k_train": False}


def dialogue(n: int) -> dict:
    """As Anthropic/hh-rlhf."""
    before = f"\n\nHuman: Say {n}\n\nAssistant: {n}\n\nHuman: Again\n\nAssistant:"
    return {"chosen": f"{before} {n}", "rejected": f"{before} No"}


def marked(n: int) -> dict:
    """As trl-lib/kto-mix-14k."""
    return {"prompt": [user(f"What is {n}?")], "completion": [assistant("n" * (n % 3 + 1))], "label": n % 2 == 0}


def spoken(n: int) -> dict:
    """As HuggingFaceH4/ultrachat_200k."""
    talk = [user(f"Say {n}"), assistant(f"{n}"), user("Again"), assistant(f"{n}!")]
    return {"prompt": f"Say {n}", "prompt_id": f"{n:x}", "messages": talk}


def toy(n: int) -> dict:
    """As configs/quickstart/train.jsonl."""
    return {"prompt": [user(f"What is {n}?")], "chosen": [assistant(f"{n}")], "rejected": [assistant("No")]}


RUNS = {
    "llama32_1b_lora": ("llama", ultrafeedback),
    "llama3_8b_simpo": ("llama", with_prompt),
    "mistral_7b_orpo": ("mistral", with_prompt),
    "opt350m_qlora_toy": ("opt", toy),
    "phi2_orca_qlora": ("phi", orca),
    "qwen15_2b_kto": ("qwen2", marked),
    "qwen2_05b_reward": ("qwen2", ultrafeedback),
    "qwen2_05b_ultrafeedback": ("qwen2", ultrafeedback),
    "qwen3_06b_hh": ("qwen3", dialogue),
    "tulu3_8b_dpo": ("llama", with_prompt),
    "zephyr_7b_dpo": ("mistral", with_prompt),
    "zephyr_7b_dpo_qlora": ("mistral", with_prompt),
    "zephyr_7b_sft": ("mistral", spoken),
}
"""The family of a recipe's model, and a row of the shape of its data set."""
PUSHED = ("qwen3_06b_hh",)


def test_every_published_run_is_tried():
    assert sorted(RUNS) == PUBLISHED and set(PUSHED) <= set(RUNS)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.nightly] * (name not in PUSHED)) for name in RUNS]
)
def test_a_recipe_runs_on_a_model_and_data_of_its_shape(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    family, row = RUNS[name]
    recipes.copy(name, tmp_path)
    given = config.load([f"configs/{name}.yaml"])
    bare = given.model.path.split("/")[-1] in NO_TEMPLATE
    template = None if bare else THINKING if family == "qwen3" else CHATML
    tokenizer = byte_tokenizer(template=template, bos=family in ("llama", "mistral"))
    ends = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id, "vocab_size": 300}
    sizes = {"num_hidden_layers": 2, "max_position_embeddings": 512, **SHAPES[family], **ends}
    folder = write_folder(tmp_path / "model", family, **sizes)
    (folder / "chat_template.jinja").unlink()
    tokenizer.save_pretrained(str(folder))
    for file, numbers in {"train": range(12, 24), "eval": range(30, 34)}.items():
        write(tmp_path / f"{file}.jsonl", *map(row, numbers))
    small = {"model.path": "model", "data.train": "train.jsonl", "data.max_length": 256, "batch.pairs": 4, "steps": 2}
    small |= {"epochs": "null", "output": "out", "model.compile_cache": "null", "log.report": "false"}
    small |= {"data.eval": "eval.jsonl", "evaluation.every": "null"} if given.data.eval else {}
    small |= {"optimizer.warmup_steps": 1} if given.optimizer.warmup_steps else {}
    with jax.numpy_dtype_promotion("standard"):  # optax counts its steps in int32
        assert train.main([f"configs/{name}.yaml", *(f"{key}={value}" for key, value in small.items())]) == 0
    steps = [record for record in read_records(tmp_path / "out/metrics.jsonl") if "loss" in record]
    assert len(steps) == 2 and steps[-1]["loss"] is not None
    assert not steps[-1].get("dropped")  # every row of the shape is one that is read
    assert ("used for all rows" in capsys.readouterr().out) == (name != "phi2_orca_qlora")  # all else are chats
    kinds = {"adapter": "adapter/adapter_config.json", "merged": "model/config.json"}
    assert all((tmp_path / "out" / kinds[kind]).is_file() for kind in given.export_kinds)
    report = json.loads((tmp_path / "out/model/config.json").read_text()) if "merged" in given.export_kinds else {}
    assert report.get("model_type", family) == family
