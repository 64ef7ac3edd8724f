"""A reward model as a judge: its scores are those of the tokens that it is trained on, in any company."""

import random

import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.data.layouts import Record
from dpo_jax.data.templates import codec, tokenize
from dpo_jax.evaluation.judges.opening import open_judge
from dpo_jax.evaluation.judges.settings import JudgeSettings
from dpo_jax.evaluation.judging import FIRST, SECOND, TIE, Contest, Scorer
from dpo_jax.evaluation.winrate import Asked
from dpo_jax.hf.checkpoint import load_hf
from dpo_jax.hf.configs import read_spec
from dpo_jax.model.attention import causal
from dpo_jax.model.decoder import hidden, scalar_scores
from tests.support.tiny_folders import write_folder
from tests.support.tiny_rows import assistant, byte_tokenizer, user

pytestmark = pytest.mark.compiles
CHANGED = dict(rtol=0, atol=1e-5)
"""float32 sums of up to 64 terms in another order, through four layers; scores are up to about 5."""


def make(folder, **changes):
    """A random reward model of bytes."""
    labels = {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, "pad_token_id": 0}
    write_folder(folder, "llama", vocab_size=264, architectures=["LlamaForSequenceClassification"], **labels, **changes)
    for name in ("chat_template.jinja", "additional_chat_templates/tool_use.jinja"):
        (folder / name).unlink()
    (folder / "additional_chat_templates").rmdir()
    byte_tokenizer(bos=True).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make(tmp_path_factory.mktemp("judge") / "reward")


@pytest.fixture(scope="module")
def judge(folder):
    return open_judge(JudgeSettings(name=f"reward:{folder}"))


ASKED = [Asked([user("Hi?")], "a:1"), Asked([user("What is 7 plus 5? " * 3)], "a:2"), Asked("Once upon", "a:3")]
ANSWERS = ["Yo", "12. Happy to help!", " a time"]


def by_hand(folder, asked, answer):
    """The score of one text, alone, as a run with objective.name=reward encodes it."""
    model = load_hf(folder, spec=read_spec(folder))
    coder = codec(byte_tokenizer(bos=True), template=None, control_tokens="text", ending="template")
    part = answer if isinstance(asked.prompt, str) else [assistant(answer)]
    (found,) = tokenize([Record(asked.prompt, (part,), (), None, {}, "a", 1)], coder)
    tokens = jnp.asarray([found.prompt + found.completions[0]])
    return float(
        scalar_scores(model.spec, model.params, hidden(model.spec, model.params, tokens, causal(*tokens.shape))[:, -1])[
            0
        ]
    )


def test_a_score_is_that_of_the_text_as_it_is_trained_on(judge, folder):
    assert isinstance(judge, Scorer)
    wanted = [by_hand(folder, asked, answer) for asked, answer in zip(ASKED, ANSWERS, strict=True)]
    np.testing.assert_allclose(judge.score(ASKED, ANSWERS), wanted, **CHANGED)
    assert len({round(score, 3) for score in wanted}) == 3  # and they differ by far more than the tolerance


@pytest.mark.nightly
def test_verdicts_of_200_pairs_are_those_of_pytorchs_scores(judge, folder):
    """180 pairs of answers that differ, and 20 of the same answer twice."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer, rng = byte_tokenizer(bos=True), random.Random(0)

    def scored(prompt, answer):
        ids = tokenizer.apply_chat_template([user(prompt), assistant(answer)], tokenize=True, return_dict=False)
        with torch.no_grad():
            return float(theirs(torch.tensor([ids])).logits[0, 0])

    contests, wanted = [], []
    for number in range(200):
        prompt = f"Question {number % 7}?"
        first = "".join(rng.choices("abcdefg ", k=rng.randint(2, 24))) + "."
        second = first if number % 10 == 0 else "".join(rng.choices("abcdefg ", k=rng.randint(2, 24))) + "."
        contests.append(Contest(Asked([user(prompt)], f"a:{number}"), (first, second)))
        gap = scored(prompt, first) - scored(prompt, second)
        assert gap == 0 or abs(gap) > 2e-5  # none of these is decided by rounding
        wanted.append(FIRST if gap > 0 else SECOND if gap < 0 else TIE)
    assert [wanted.count(end) > 15 for end in (FIRST, TIE, SECOND)] == [True] * 3
    assert [verdict.outcome for verdict in judge.compare(contests)] == wanted
