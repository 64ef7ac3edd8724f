"""Where a trained model stops: the end of turn is listed, or said not to be, and mended if that is asked."""

import json

import pytest

from dpo_jax.errors import UserError
from dpo_jax.hf.ending import aligned, check_setting, ending_of
from tests.support.tiny_rows import byte_tokenizer


@pytest.mark.parametrize(
    ("generation", "config", "listed"),
    [
        ({"eos_token_id": "END"}, {}, True),
        ({"eos_token_id": [2, "END"]}, {"eos_token_id": 2}, True),
        ({}, {"eos_token_id": "END"}, True),
        (None, {"eos_token_id": "END"}, True),
        ({"eos_token_id": 2, "top_p": 0.5}, {"eos_token_id": "END"}, False),
        ({"eos_token_id": [2, 1]}, {}, False),
        (None, {"eos_token_id": 2}, False),
        (None, {}, False),
    ],
)
def test_the_end_of_turn_is_listed_or_said_and_mended(generation, config, listed, tmp_path):
    tokenizer = byte_tokenizer()
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")

    def write(name, table):
        (tmp_path / name).write_text(json.dumps(table).replace('"END"', str(end)))

    write("config.json", config)
    if generation is not None:
        write("generation_config.json", generation)
    found = ending_of(tmp_path, tokenizer)
    assert found is not None and (found.id, found.token, found.is_listed) == (end, "<|im_end|>", listed)
    if listed:
        assert found.line(False) is found.line(True) is None and aligned(tmp_path, found) == {}
        return
    assert f"answers end with token {end} (<|im_end|>)" in str(found.line(False))
    assert "export.align_eos=true" in str(found.line(False)) and "lists it too" in str(found.line(True))
    table = json.loads(aligned(tmp_path, found)["generation_config.json"])
    assert table.pop("eos_token_id") == [*found.listed, end]
    assert table == {name: value for name, value in (generation or {}).items() if name != "eos_token_id"}


def test_without_a_template_answers_end_with_eos(tmp_path):
    tokenizer = byte_tokenizer(template=None)
    (tmp_path / "config.json").write_text('{"eos_token_id": 77}')
    found = ending_of(tmp_path, tokenizer)
    assert found is not None and (found.id, found.listed) == (tokenizer.eos_token_id, (77,))
    tokenizer.eos_token = None
    assert ending_of(tmp_path, tokenizer) is None


def test_a_reward_model_has_nothing_to_align():
    check_setting(align=False, scalar_head=True)
    with pytest.raises(UserError, match="export.align_eos: a reward model generates nothing"):
        check_setting(align=True, scalar_head=True)


@pytest.mark.parametrize(
    "changes", [{"temperature": 10**400}, {"eos_token_id": 10**400}, {"top_k": -1}, {"top_p": 1e999}]
)
def test_a_number_that_is_none_is_named(changes, tmp_path):
    (tmp_path / "generation_config.json").write_text(json.dumps(changes))
    with pytest.raises(UserError, match=f"generation_config.json: {next(iter(changes))} = .* will not do"):
        ending_of(tmp_path, byte_tokenizer())
