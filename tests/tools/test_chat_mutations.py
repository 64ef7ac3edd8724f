"""The tool that holds rows of many shapes against what chat templates write of them."""

import importlib.util
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.support.chat_templates import CUTTING, TEXT_CALLS, THINKING, tokenizer_with
from tests.support.tiny_rows import byte_tokenizer
from tools import chat_mutations
from tools.mutating import compare, families
from tools.mutating.rows import KINDS


def tokenizers() -> dict:
    named = {"chatml": byte_tokenizer(), "thinking": tokenizer_with(THINKING)}
    return named | {"cutting": tokenizer_with(CUTTING, bos=True), "text calls": tokenizer_with(TEXT_CALLS)}


def test_nothing_is_other_than_the_template_has_it_refused_or_a_choice():
    made = chat_mutations.run(tokenizers(), rows=4 * len(KINDS), seed=0)
    lines = made.lines()
    assert made.total()["other"] == 0, "\n".join(lines)
    assert made.total().total() == 4 * len(KINDS) and len(KINDS) >= 30
    assert all(made.total()[verdict] > len(KINDS) / 4 for verdict in ("equal", "refused", "choice"))
    assert lines[-1].startswith("refused: ") and f"{'prefill':<26}     0/0/1/0" in "\n".join(lines)


def test_the_same_seed_gives_the_same_table():
    few = {"chatml": byte_tokenizer()}
    first, second, other = (chat_mutations.run(few, rows=len(KINDS), seed=seed).lines() for seed in (1, 1, 2))
    assert first == second and len(first) == len(other)


def broken(change):
    """The tool's own `tokenize`, with a change to what it gives."""
    true = compare.tokenize

    def tokenize(records, coder):
        return [found if isinstance(found, compare.BadRow) else change(found) for found in true(records, coder)]

    return tokenize


BROKEN = {
    "a token of the answer is lost": (lambda made: made._replace(completions=[ids[1:] for ids in made.completions])),
    "the prompt is longer": (
        lambda made: made._replace(prompt=made.prompt + made.completions[0][:1], completions=made.completions)
    ),
    "nothing is said": lambda made: made._replace(notes=()),
    "all is scored": lambda made: made._replace(unscored=[[] for _ in made.unscored]),
    "nothing is scored": lambda made: made._replace(unscored=[[(0, len(ids))] for ids in made.completions]),
}


@pytest.mark.parametrize("change", BROKEN.values(), ids=BROKEN)
def test_what_is_wrong_is_seen(monkeypatch, change):
    monkeypatch.setattr(compare, "tokenize", broken(change))
    few = {name: tokenizer for name, tokenizer in tokenizers().items() if name in ("thinking", "cutting")}
    made = chat_mutations.run(few, rows=2 * len(KINDS), seed=0)
    assert made.total()["other"] >= 2 and made.lines()[-1].startswith("other: ")


def test_real_templates_give_nothing_other():
    """On a few rows of each family; the tool's own run has 3,000."""
    found = importlib.util.find_spec("trl")
    if found is None or found.origin is None:
        pytest.skip("the chat templates of real families come with trl, which is not installed")
    folder = Path(found.origin).parent / "chat_templates"
    if not folder.is_dir():
        pytest.skip("this trl has no chat templates")
    base = ROOT / "configs" / "quickstart" / "model"
    named = [name for name, family in families.FAMILIES.items() if (folder / f"{family.template}.jinja").is_file()]
    real = {name: families.tokenizer_of(families.FAMILIES[name], folder, base) for name in named}
    made = chat_mutations.run(real, rows=len(KINDS) * len(real), seed=0)
    assert len(real) >= 12 and made.total()["other"] == 0, "\n".join(made.lines())
