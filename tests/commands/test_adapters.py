"""Adapters in commands: with a base, and given alone as a model."""

import io
import json
import sys

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dpo_jax import convert, evaluate, sample, winrate
from dpo_jax.errors import UserError
from dpo_jax.hf.adapted import adapted
from dpo_jax.hf.checkpoint import load_hf, save_hf
from dpo_jax.hf.tokenizer import load_tokenizer
from tests.commands.test_sample import make
from tests.support.chat_server import ChatServer, completion
from tests.support.peft_folders import PREFIX, halves, write_peft
from tests.support.tiny_rows import write

Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A base, an adapter that names it, and the two merged."""
    root = tmp_path_factory.mktemp("adapters")
    base = make(root / "base")
    made = halves(Q, 32, 32) | halves("model.layers.3.mlp.down_proj", 32, 48) | halves("lm_head", 264, 32)
    adapter = write_peft(root / "adapter", made, base_model_name_or_path=str(base), lora_alpha=1)
    assert convert.main(["merge", str(base), str(adapter), str(root / "merged")]) == 0
    rows = [{"prompt": f"Say {n}", "chosen": "yes, it is", "rejected": "no"} for n in range(6)]
    write(root / "rows.jsonl", *rows)
    return root


def test_a_merged_folder_is_a_model_and_says_what_rounding_did(world, tmp_path, capsys):
    argv = [str(world / "base"), str(world / "adapter"), str(tmp_path / "out")]
    assert convert.main(["merge", *argv, "--dtype", "bfloat16"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"wrote and verified {tmp_path / 'out'}: the adapter changes ") and out.count("\n") == 1
    assert "weights of 3 tensors; rounding leaves" in out
    one, other = load_hf(world / "base", adapter=world / "adapter"), load_hf(world / "merged")
    assert one.spec == other.spec and not one.spec.tied
    assert jax.tree.all(jax.tree.map(lambda left, right: bool((left == right).all()), one.params, other.params))
    save_hf(other, tmp_path / "again", world / "merged")
    assert convert.main(["merge", *argv]) == 2 and "is not empty" in capsys.readouterr().err


def test_a_check_compares_the_adapter_merged_and_in_peft(world, capsys):
    assert convert.main(["check", str(world / "base"), "--adapter", str(world / "adapter"), "--no-torch"]) == 0
    out = capsys.readouterr().out
    assert "ok       merged, logits" in out and "PEFT" in out
    assert out.endswith("the merged model is the base with the adapter\n")
    assert convert.main(["check", str(world / "adapter"), "--no-torch"]) == 0
    said = f"{world / 'adapter'} is an adapter of {world / 'base'}, which its adapter_config.json names\n"
    assert capsys.readouterr().out.startswith(said)


@pytest.mark.parametrize("how", ["alone", "beside its base", "of a run"])
def test_winrate_takes_an_adapter_however_it_is_given(world, tmp_path, monkeypatch, capsys, how):
    monkeypatch.chdir(tmp_path)
    base, adapter = str(world / "base"), world / "adapter"
    if how == "of a run":
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "adapter").symlink_to(adapter)
    given = {"alone": [str(adapter)], "beside its base": [base, "--adapter", str(adapter)], "of a run": ["run"]}[how]
    write(tmp_path / "asked.jsonl", *({"prompt": f"Say {n}", "good": "."} for n in range(2)))
    words = [given[0], base, *given[1:], "--prompts", "asked.jsonl", "--judge", "rule", "--max-new-tokens", "4"]
    assert winrate.main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["prompts"] == 2 and found["judges"][0]["judge"] == "rule"


def test_the_folder_of_an_adapters_run_is_told_from_an_adapter(world, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "adapter").symlink_to(world / "adapter")
    said = f"{tmp_path / 'run'} is the folder of a run, with its adapter in {tmp_path / 'run' / 'adapter'}; give that"
    for load in (
        lambda: load_hf(tmp_path / "run"),
        lambda: load_tokenizer(tmp_path / "run"),
        lambda: load_hf(world / "base", adapter=tmp_path / "run"),
    ):
        with pytest.raises(UserError) as caught:
            load()
        assert str(caught.value) == said


@pytest.fixture
def ask(capsys, monkeypatch):
    """Rows of JSON that `sample` prints, and its stderr."""
    monkeypatch.setattr(jax, "device_count", lambda: 1)

    def run(*argv):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
        code = sample.main([*map(str, argv), "--prompt", "Hi", "--max-new-tokens", "20", "--json", "--greedy"])
        out, err = capsys.readouterr()
        assert code is None or code == 0, err
        return [json.loads(line) for line in out.splitlines()], err

    return run


def test_a_base_and_its_adapter_answer_as_the_merged_model_and_beside_the_base(world, ask):
    with_adapter, err = ask(world / "base", "--adapter", world / "adapter", "--against", world / "base")
    assert "is an adapter" not in err
    alone, err = ask(world / "adapter", "--against", world / "base")
    assert err.startswith(f"{world / 'adapter'} is an adapter of {world / 'base'}")
    merged, _ = ask(world / "merged", "--against", world / "base")
    text = json.dumps(with_adapter)
    assert text == json.dumps(alone) and text.replace('"adapter"', '"merged"') == json.dumps(merged)
    assert '"adapter"' in text and '"base"' in text


def test_an_adapter_is_measured_against_its_base(world, capsys):
    pairs = str(world / "rows.jsonl")

    def measured(*argv):
        assert evaluate.main([*map(str, argv), pairs, "--json"]) == 0
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    base = world / "base"
    one = measured(base, "--adapter", world / "adapter", "--reference", base)
    alone = measured(world / "adapter", "--reference", base)
    merged = measured(world / "merged", "--reference", base)
    assert one == alone == pytest.approx(merged) and abs(one["rewards/margins"]) > 1e-3
    plain = measured(base, "--reference", base)
    assert plain["rewards/margins"] == pytest.approx(0, abs=1e-6)


def test_a_tutorials_metrics_are_those_of_the_base_with_its_adapter(world, capsys, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    base, pairs = world / "base", str(world / "rows.jsonl")

    def measured(*argv, metrics="reward_margin,preference_accuracy,win_rate"):
        with ChatServer(lambda number, text: (200, {}, completion('{"better": "A"}'))) as server:
            judge = ("--judge", server.url, "--judge-model", "m") if "win_rate" in metrics else ()
            call = [*argv, pairs, "--metrics", metrics, "--max-samples", 1, "--max-new-tokens", 8, *judge, "--json"]
            code = evaluate.main([*map(str, call)])
        out, err = capsys.readouterr()
        assert code == 0, err
        return json.loads(out.splitlines()[-1])

    with_adapter = measured(base, "--adapter", world / "adapter", "--reference", base)
    merged = measured(world / "merged", "--reference", base)
    assert with_adapter == pytest.approx(merged) and abs(merged["reward_margin"]) > 1e-4
    assert merged["pairs"] == 1 and merged["win_rate"] == 0.5  # the judge always says A, so both orders disagree
    alone = measured(base, metrics="preference_accuracy")
    assert alone == {"pairs": 1, "preference_accuracy": pytest.approx(0.5, abs=0.5)}
    assert measured(base, "--reference", base, metrics="reward_margin")["reward_margin"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["adapter", "--adapter", "adapter"], "is an adapter, and --adapter"),
        (["nameless"], "names no base_model_name_or_path; give BASE with --adapter"),
        (["lost"], "is an adapter of ./nowhere, not a model: there is no folder './nowhere'"),
        (["base", "--adapter", "base"], "adapter_config.json is missing"),
        (["base", "--adapter", "strange"], "is of nothing in the base"),
    ],
)
def test_what_is_no_adapter_of_a_base_is_one_line(argv, says, world, monkeypatch, capsys):
    monkeypatch.chdir(world)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    write_peft(world / "nameless", halves(Q, 32, 32), base_model_name_or_path=...)
    write_peft(world / "lost", halves(Q, 32, 32), base_model_name_or_path="./nowhere")
    write_peft(world / "strange", halves("h.0.attn.c_attn", 96, 32))
    for run in (
        lambda: sample.main([*argv, "--prompt", "x"]),
        lambda: evaluate.main([*argv, "rows.jsonl"]),
        lambda: convert.main(["check", *argv]),
    ):
        assert run() == 2
        err = capsys.readouterr().err
        assert says in err and err.startswith("error: ") and err.count("\n") == 1


def test_an_adapter_beside_a_model_is_no_adapter_alone(world):
    assert adapted(str(world / "base")) == (str(world / "base"), None, "")
    found = adapted(str(world / "base"), str(world / "adapter"))
    assert found.adapter == world / "adapter" and found.name == "adapter" and not found.line


def test_damaged_factors_are_refused_by_the_command(world, tmp_path, capsys):
    made = load_file(world / "adapter" / "adapter_model.safetensors")
    made[f"{PREFIX}{Q}.lora_B.weight"] = np.full((32, 2), np.inf, np.float32)
    folder = write_peft(tmp_path / "a", {})
    save_file(made, folder / "adapter_model.safetensors")
    assert convert.main(["merge", str(world / "base"), str(folder), str(tmp_path / "out")]) == 2
    assert "64 values that are NaN or infinite" in capsys.readouterr().err and not (tmp_path / "out").exists()
