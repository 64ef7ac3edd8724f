"""What a judge that compares is asked: a template, filled with a prompt and two answers in one of both orders."""

from pathlib import Path
from typing import Any, Literal

from dpo_jax.data.strangers import MOST_TEMPLATE
from dpo_jax.errors import UserError, one_line, printable
from dpo_jax.evaluation.judging import Contest
from dpo_jax.evaluation.winrate import Asked, Prompt

DEFAULT = Path(__file__).with_name("pairwise.jinja")
Reply = Literal["json", "letter", "continued"]
MARKS = ("\ue000prompt\ue000", "\ue000first\ue000", "\ue000second\ue000")
"""Stand for a prompt and two answers where a template is tried."""


class Template:
    """A Jinja template of questions to a judge; `source` is its text."""

    def __init__(self, file: str | None = None):
        """Read a file, or else the template of the package.

        Raises:
          UserError: it cannot be read, is no template, or leaves out the prompt or one of the answers.
        """
        path = DEFAULT if file is None else Path(file).expanduser()
        self._file = printable(str(path))
        try:
            with path.open(encoding="utf-8") as handle:
                self.source = handle.read(MOST_TEMPLATE + 1)
        except (OSError, UnicodeDecodeError) as error:
            why = getattr(error, "strerror", None) or "is not UTF-8 text"
            raise UserError(f"{self._file}: {why}; give a Jinja template of the question to the judge") from error
        if len(self.source) > MOST_TEMPLATE:
            raise UserError(f"{self._file}: is longer than a template may be ({MOST_TEMPLATE:,} characters)")
        self._render = _compiled(self.source, self._file)
        tried = Contest(Asked(MARKS[0], ""), (MARKS[1], MARKS[2]))
        for reply in ("json", "letter", "continued"):
            text = self.question(tried, swapped=False, reply=reply)
            for mark, name in zip(MARKS, ("conversation", "first", "second"), strict=True):
                if mark not in text:
                    raise UserError(f"{self._file}: leaves out {{{{ {name} }}}}; a judge must see both answers")

    def question(self, contest: Contest, *, swapped: bool, reply: Reply) -> str:
        """The question, with the contest's first answer as A, or as B where they are swapped.

        Raises:
          UserError: the template names something that it is not given, or goes wrong.
        """
        first, second = reversed(contest.answers) if swapped else contest.answers
        prompt = contest.asked.prompt
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        given = {"conversation": conversation(prompt), "messages": messages, "first": first, "second": second}
        try:
            return self._render(**given, reply=reply).strip()
        except Exception as error:  # whatever a template may do
            names = ", ".join((*given, "reply"))
            raise UserError(f"{self._file}: {printable(one_line(error))}; a template is given {names}") from error


def _compiled(source: str, file: str) -> Any:
    from jinja2 import StrictUndefined, TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    try:
        return environment.from_string(source).render
    except TemplateError as error:
        raise UserError(f"{file}: is no Jinja template: {printable(one_line(error))}; correct it") from error


def conversation(prompt: Prompt) -> str:
    """A prompt as text: as it is, or the turns of a conversation one after the other.

    >>> conversation([{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi?"}])
    '[system]\\nBe kind.\\n\\n[user]\\nHi?'
    """
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return str(prompt[0].get("content", ""))
    return "\n\n".join(f"[{turn['role']}]\n{turn.get('content', '')}" for turn in prompt)
