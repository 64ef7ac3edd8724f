"""What a run says of the folder that it starts from, and mends in the folder that it leaves."""

import json
import shutil

import pytest
from safetensors.numpy import load_file
from transformers import AutoTokenizer

from dpo_jax import doctor, evaluate, sample, train
from dpo_jax.hf import tensors
from dpo_jax.run import output
from tests.support.tiers import by_day
from tests.support.tiny_folders import write_folder
from tests.support.tiny_rows import byte_tokenizer, write, yes_or_no


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tokenizer that knows more tokens than its model has rows for, and ends turns with one that no file lists."""
    root = tmp_path_factory.mktemp("folders")
    tokenizer = byte_tokenizer()
    write_folder(root / "model", num_hidden_layers=1, vocab_size=len(tokenizer), eos_token_id=2)
    (root / "model" / "generation_config.json").write_text('{"eos_token_id": 2, "top_p": 0.9}')
    tokenizer.add_tokens([f"<new{n}>" for n in range(3)])
    tokenizer.save_pretrained(root / "model")
    rows = yes_or_no(12)
    for row in rows:
        row["prompt"][0]["content"] += " <new2>"
    write(root / "train.jsonl", *rows)
    return root


def arguments(world, name, *more):
    given = {"model.path": world / "model", "data.train": world / "train.jsonl", "output": world / name, "steps": 2}
    given |= {"batch.pairs": 4, "batch.micro_tokens": 512, "data.control_tokens": "tokens"}
    given |= {"log.report": "false"}  # a page takes longer than the steps
    return [*(f"{key}={value}" for key, value in given.items()), *more]


def test_without_the_setting_nothing_is_resized(world, capsys):
    assert train.main(arguments(world, "plain")) == 2
    said = capsys.readouterr().err
    assert "has no row in the model's embedding" in said and "model.resize_embedding=true" in said


@pytest.mark.parametrize("mode", by_day(["cached", "live"], ["live"]))
def test_a_run_resizes_aligns_says_so_and_goes_on(world, mode, capsys):
    argv = arguments(world, mode, "model.resize_embedding=true", "export.align_eos=true", f"reference.mode={mode}")
    assert train.main(argv) == 0
    said, folder = capsys.readouterr().out, world / mode / "model"
    before = json.loads((world / "model" / "config.json").read_text())["vocab_size"]
    assert f"the embedding has {before:,} rows and gets 3 more" in said and "(export.align_eos)" in said
    assert json.loads((folder / "config.json").read_text())["vocab_size"] == before + 3
    end = byte_tokenizer().convert_tokens_to_ids("<|im_end|>")
    assert json.loads((folder / "generation_config.json").read_text()) == {"eos_token_id": [2, end], "top_p": 0.9}
    assert load_file(folder / "model.safetensors")["lm_head.weight"].shape[0] == before + 3
    assert (
        "gets 3 more" in (folder / "README.md").read_text() and "gets 3 more" in (folder / "dpo_jax.json").read_text()
    )
    assert output.recorded(world / mode)["facts"]["rows of the embedding"] == before + 3
    assert train.main(argv) == 0 and "finished already" in capsys.readouterr().out


def test_the_folder_of_a_run_is_told_from_its_model(world, capsys):
    """`RUN` in place of `RUN/model`."""
    (world / "run" / "model").mkdir(parents=True)
    (world / "run" / "model" / "config.json").write_text("{}")
    run = str(world / "run")
    for command, argv in (
        (sample, [run, "--prompt", "x"]),
        (evaluate, [run, str(world / "train.jsonl")]),
        (train, arguments(world, "other", f"model.path={run}")),
    ):
        assert command.main(argv) == 2
        assert f"{run} is the folder of a run, with its model in {run}/model; give that" in capsys.readouterr().err


def test_the_template_that_a_model_was_trained_with_goes_with_it(world, tmp_path, capsys):
    bare = tmp_path / "bare"
    shutil.copytree(world / "model", bare)
    (bare / "chat_template.jinja").unlink()
    other = tmp_path / "other.jinja"
    other.write_text("{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}")
    for name, model in (("none", bare), ("own", world / "model")):  # one that has none, and one that has its own
        more = ("model.resize_embedding=true", f"model.path={model}", f"data.template={other}")
        assert train.main(arguments(world, tmp_path / name, *more)) == 0
        made = tmp_path / name / "model"
        assert AutoTokenizer.from_pretrained(made).get_chat_template() == other.read_text()
        assert tensors.changed_files(made) == [] and "(data.template)" in (made / "README.md").read_text()
        capsys.readouterr()
        assert (
            evaluate.main([str(made), str(world / "train.jsonl"), "--max-samples", "2", "data.control_tokens=tokens"])
            == 0
        )


def test_the_doctor_says_it_too(world, capsys):
    path = world / "run.yaml"
    path.write_text("steps: 2\n")
    doctor.main([str(path), *arguments(world, "d", "model.resize_embedding=true")])
    said = capsys.readouterr().out
    assert "gets 3 more" in said and "export.align_eos=true" in said
