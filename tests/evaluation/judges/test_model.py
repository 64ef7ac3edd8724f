"""A local model as a judge: the letter that it finds more probable, asked in both orders."""

import numpy as np
import pytest

from dpo_jax.evaluation.judges import model as judges
from dpo_jax.evaluation.judges.asking import Template
from dpo_jax.evaluation.judging import FIRST, SECOND, TIE
from dpo_jax.evaluation.statistics import summary
from dpo_jax.evaluation.winrate import prompt_codec
from tests.support.chat_server import better, prepared
from tests.support.tiny_rows import CHATML, byte_tokenizer


@pytest.mark.parametrize("template", [CHATML, None])
@pytest.mark.parametrize("honest", [True, False])
def test_verdicts_of_200_prepared_pairs(monkeypatch, template, honest):
    """The log-probabilities stand in for a model: of one that sees the qualities, and of one that always says A."""
    tokenizer = byte_tokenizer(template=template)
    letters = {letter: tokenizer.convert_tokens_to_ids(letter) for letter in "AB"}

    def next_logits(model, texts, **_):
        rows = []
        for text in texts:
            said = better(tokenizer.decode(text)) if honest else "A"
            row = np.zeros(len(tokenizer), np.float32)
            if said in letters:
                row[letters[said]] = 2.0
            rows.append(row)
        return rows

    monkeypatch.setattr(judges, "next_logits", next_logits)
    contests = prepared(200)
    judge = judges.ModelJudge.__new__(judges.ModelJudge)
    judge.name, judge._model, judge._coder, judge._template = "model:x", None, prompt_codec(tokenizer), Template()
    judge._mesh, judge._batch, judge._chat = None, 8, template is not None
    found = judge.compare(contests)
    ends = {"A": FIRST, "B": SECOND, "tie": TIE}
    if honest:
        assert [verdict.outcome for verdict in found] == [ends[better(" ".join(one.answers))] for one in contests]
        assert all(verdict.shown == verdict.swapped for verdict in found)
    else:
        assert summary(found, [(1, 1)] * 200).position_bias == 1.0
