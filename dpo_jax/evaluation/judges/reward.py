"""The reward model: its score of an answer behind its prompt, in the very tokens that such a model is trained on."""

from collections.abc import Sequence

import numpy as np
from jax.sharding import Mesh

from dpo_jax.data.layouts import Part, Record
from dpo_jax.data.messages import BadRow
from dpo_jax.data.report import clean
from dpo_jax.data.templates import Codec, codec, template_source, tokenize
from dpo_jax.errors import UserError
from dpo_jax.evaluation.judging import Contest, Verdict, compared
from dpo_jax.evaluation.models import open_model
from dpo_jax.evaluation.reading import scores_of
from dpo_jax.evaluation.winrate import Asked, Question
from dpo_jax.files import digest_of
from dpo_jax.hf.tensors import SIDE_FILES, local_folder
from dpo_jax.hf.tokenizer import load_tokenizer
from dpo_jax.model.decoder import Model

WORST = -float("inf")
"""The score of an answer that says nothing, of which training has no example."""


class RewardJudge:
    """A model with a scalar head. Scores are kept, so that an answer that comes again costs nothing."""

    def __init__(self, name: str, model: Model, coder: Codec, *, mesh: Mesh | None = None, batch_size: int = 8):
        """Of a model and its own tokenizer."""
        self.name, self._model, self._coder, self._mesh, self._batch = name, model, coder, mesh, batch_size
        self._known: dict[str, float] = {}

    def score(self, asked: Sequence[Asked | Question], answers: Sequence[str]) -> list[float]:
        """The score of each answer behind its prompt; `WORST` for one that is empty.

        Raises:
          UserError: a prompt is of messages and the tokenizer has no chat template, or the template refuses it.
        """
        said = [index for index, answer in enumerate(answers) if answer.strip()]
        texts = _texts([asked[index] for index in said], [answers[index] for index in said], self._coder)
        keys = [digest_of(np.asarray(text, np.int32).tobytes()) for text in texts]
        new = {key: text for key, text in zip(keys, texts, strict=True) if key not in self._known}
        found = scores_of(self._model, list(new.values()), batch_size=self._batch, mesh=self._mesh)
        self._known |= zip(new, found, strict=True)
        scores = dict(zip(said, (self._known[key] for key in keys), strict=True))
        return [scores.get(index, WORST) for index in range(len(answers))]

    def compare(self, contests: Sequence[Contest]) -> list[Verdict]:
        """The answer of the higher score is the better one; raises as `score`."""
        asked = [contest.asked for contest in contests]
        answers = [contest.answers[side] for side in (0, 1) for contest in contests]
        scores = self.score([*asked, *asked], answers)
        return compared(scores[: len(asked)], scores[len(asked) :])


def open_reward(folder: str, *, mesh: Mesh | None = None) -> RewardJudge:
    """The judge of a reward model's folder, or hub id.

    Raises:
      UserError: there is none, or it cannot be used.
    """
    tokenizer = load_tokenizer(local_folder(folder, SIDE_FILES))
    coder = codec(tokenizer, template=None, control_tokens="text", ending="template")
    return RewardJudge(f"reward:{folder}", open_model(folder, mesh=mesh, scalar_head=True), coder, mesh=mesh)


def _texts(asked: Sequence[Asked | Question], answers: Sequence[str], coder: Codec) -> list[list[int]]:
    """Token ids of each prompt with its answer, ended as in training."""
    records = [
        Record(item.prompt, (_part(item, answer, coder),), (), None, {}, item.where, 1)
        for item, answer in zip(asked, answers, strict=True)
    ]
    texts = []
    for item, found in zip(asked, tokenize(records, coder), strict=True):
        if isinstance(found, BadRow):
            raise UserError(f"{item.where}: {clean(str(found))}; the reward model cannot read it with its answer")
        texts.append([*found.prompt, *found.completions[0]])
    return texts


def _part(asked: Asked | Question, answer: str, coder: Codec) -> Part:
    if isinstance(asked.prompt, str):
        return answer
    if template_source(coder.tokenizer, coder.template) is None:
        raise UserError(f"{asked.where}: messages need a chat template and the reward model's tokenizer has none")
    return [{"role": "assistant", "content": answer}]
