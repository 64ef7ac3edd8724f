"""A local language model that compares: the probability of A against that of B, as the next token, in both orders."""

from collections.abc import Sequence

from jax.sharding import Mesh

from dpo_jax.data.layouts import Part, Record
from dpo_jax.data.messages import BadRow, shared_length
from dpo_jax.data.report import clean
from dpo_jax.data.templates import Codec, template_source, tokenize
from dpo_jax.errors import UserError
from dpo_jax.evaluation.judges.asking import Template
from dpo_jax.evaluation.judging import FIRST, SECOND, TIE, Contest, Verdict
from dpo_jax.evaluation.models import open_model
from dpo_jax.evaluation.reading import next_logits
from dpo_jax.evaluation.winrate import prompt_codec
from dpo_jax.hf.tensors import SIDE_FILES, local_folder
from dpo_jax.hf.tokenizer import load_tokenizer
from dpo_jax.model.decoder import Model


class ModelJudge:
    """A model, its own tokenizer, and the question that it is asked."""

    def __init__(
        self,
        name: str,
        model: Model,
        coder: Codec,
        template: Template,
        *,
        mesh: Mesh | None = None,
        batch_size: int = 8,
    ):
        """The question becomes a user's message where the tokenizer has a chat template, and else a text."""
        self.name, self._model, self._coder, self._template = name, model, coder, template
        self._mesh, self._batch = mesh, batch_size
        self._chat = template_source(coder.tokenizer, coder.template) is not None

    def compare(self, contests: Sequence[Contest]) -> list[Verdict]:
        """The answer whose letter is the more probable one; the reason is by how many nats, in both orders.

        Raises:
          UserError: a question does not fit the model.
        """
        nats = self._margins([(contest, swapped) for swapped in (False, True) for contest in contests])
        pairs = zip(nats[: len(contests)], nats[len(contests) :], strict=True)
        return [
            Verdict(_end(shown), 1 - _end(swapped), f"A over B: {shown:+.3f} nats, {swapped:+.3f} swapped")
            for shown, swapped in pairs
        ]

    def _margins(self, questions: Sequence[tuple[Contest, bool]]) -> list[float]:
        """Log-probability of A less that of B, in nats, for each contest as it is shown, or swapped."""
        records = [self._record(contest, swapped) for contest, swapped in questions]
        texts, letters = [], []
        for (contest, _), found in zip(questions, tokenize(records, self._coder), strict=True):
            if isinstance(found, BadRow):
                raise UserError(f"{contest.asked.where}: {clean(str(found))}; {self.name} cannot be asked this")
            one, other = found.completions
            shared = shared_length(one, other)
            texts.append([*found.prompt, *one[:shared]])
            letters.append((one[shared], other[shared]))
        logits = next_logits(self._model, texts, batch_size=self._batch, mesh=self._mesh)
        return [float(row[a]) - float(row[b]) for row, (a, b) in zip(logits, letters, strict=True)]

    def _record(self, contest: Contest, swapped: bool) -> Record:
        reply = "letter" if self._chat else "continued"
        question: Part = self._template.question(contest, swapped=swapped, reply=reply)
        letters: tuple[Part, ...] = (" A", " B")
        if self._chat:
            question = [{"role": "user", "content": question}]
            letters = tuple([{"role": "assistant", "content": letter}] for letter in "AB")
        return Record(question, letters, (), None, {}, contest.asked.where, 1)


def open_model_judge(folder: str, template: Template, *, mesh: Mesh | None = None) -> ModelJudge:
    """The judge of a language model's folder, or hub id.

    Raises:
      UserError: there is none, or it cannot be used.
    """
    coder = prompt_codec(load_tokenizer(local_folder(folder, SIDE_FILES)))
    return ModelJudge(f"model:{folder}", open_model(folder, mesh=mesh), coder, template, mesh=mesh)


def _end(nats: float) -> float:
    return FIRST if nats > 0 else SECOND if nats < 0 else TIE
