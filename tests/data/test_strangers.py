"""A chat template or a tokenizer that nobody vouches for: it ends, or what it does is one line."""

import pytest

from dpo_jax.data import strangers
from dpo_jax.data.strangers import apply_template, check_template, try_tokenizer
from dpo_jax.data.templates import codec
from dpo_jax.errors import UserError
from dpo_jax.limits import Died, tried
from tests.support.encoding import encoded_rows
from tests.support.tiny_rows import CHAT, CHATML, byte_tokenizer, user

FOREVER = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
DOUBLING = "{% set n = namespace(s='aaaaaaaa') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}"
TWICE = "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(99) }}"
LONG = "{% for i in range(9999) %}{{ 'a' * 9999 }}{% endfor %}"


@pytest.fixture
def quick(monkeypatch):
    """Less patience, for tests."""
    monkeypatch.setattr(strangers, "tried", lambda function, argument: tried(function, argument, seconds=1.0))
    monkeypatch.setattr(strangers, "RENDER_SECONDS", 0.3)
    check_template.cache_clear()
    yield
    check_template.cache_clear()


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (FOREVER, "is not done after 1 s"),
        (TWICE, "is not done after 1 s"),
        (DOUBLING, "wants more than|is not done"),
        ("{{ '%0999999999d' % 5 }}", "wants more than|is not done"),
        ("{{ 'a'|center(10**10) }}", "wants more than"),
        ("{% if add_generation_prompt and messages|length > 2 %}" + FOREVER + "{% endif %}", "is not done"),
        (LONG, "writes 99980001 characters"),
        ("a" * (strangers.MOST_TEMPLATE + 1), "has 1048577 characters"),
    ],
)
def test_a_template_that_does_not_end_is_refused_before_it_is_used(template, says, quick):
    with pytest.raises(UserError, match=f"the chat template .*({says}).*data.template"):
        codec(byte_tokenizer(template=template), template=None, control_tokens="text", ending="terminator")


@pytest.mark.parametrize("template", [CHATML, "{{ raise_exception('no') }}", "{% broken", "{{ messages[7].role }}", ""])
def test_a_template_that_ends_is_left_to_its_rows(template, quick):
    codec(byte_tokenizer(template=template), template=None, control_tokens="text", ending="terminator")


@pytest.mark.parametrize(
    ("trap", "says"),
    [
        (FOREVER, "is not done after 0.3 s"),
        (DOUBLING, "wants more than|is not done"),
        (LONG, "writes \\d+ characters|is not done"),
    ],
)
@pytest.mark.parametrize("words", ["trap", "trap <eos>"])
def test_a_template_that_ends_but_for_one_row_is_refused_at_that_row(trap, says, words, quick, tmp_path):
    template = f"{{% if 'trap' in messages[0].content %}}{trap}{{% endif %}}{CHATML}"
    rows = [CHAT, CHAT, {**CHAT, "prompt": [user(words)]}]
    with pytest.raises(UserError, match=f"rows.jsonl:3: the chat template ({says})"):
        encoded_rows(tmp_path, byte_tokenizer(template=template), *rows)


def test_a_long_conversation_may_be_written_at_length():
    chat = [user("long " * 400_000)]
    assert len(apply_template(byte_tokenizer(), chat, "here", tokenize=False)) > 2_000_000


@pytest.mark.parametrize("change", ["whole", "padded", "grown"])
def test_a_tokenizer_is_loaded_and_used_where_it_may_die(change, tmp_path):
    from tokenizers import Tokenizer, normalizers

    backend = byte_tokenizer().backend_tokenizer
    if change == "padded":
        backend.enable_padding(length=10**9)
    if change == "grown":
        backend.normalizer = normalizers.Sequence([normalizers.Replace("a", "aa")] * 40)
    assert isinstance(backend, Tokenizer)
    backend.save(str(tmp_path / "tokenizer.json"))
    if change == "whole":
        tried(try_tokenizer, str(tmp_path / "tokenizer.json"))
        return
    with pytest.raises(Died):
        tried(try_tokenizer, str(tmp_path / "tokenizer.json"), seconds=2.0, memory=1 << 30)


def test_a_panic_of_the_tokenizer_is_one_line(monkeypatch):
    class PanicException(BaseException):
        pass

    def panics(*_, **__):
        raise PanicException("index out of bounds")

    tokenizer = byte_tokenizer()
    monkeypatch.setattr(type(tokenizer), "__call__", panics)
    with pytest.raises(UserError, match="failed on a text .PanicException: index out of bounds"):
        strangers.ids_of(tokenizer, ["a"])
