"""The share of good answers: a model is asked, answers greedily, and each answer is held against a pattern.

A file of questions is JSON Lines, one object a line: `prompt` (a text, taken as it stands, or a list of messages, put
through the chat template) and `good`, a regular expression that is found (`re.search`, `.` matches line ends too) in a
good answer and in no bad one.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

from jax.sharding import Mesh

from dpo_jax.data.answers import Answers
from dpo_jax.data.dialogues import in_turns
from dpo_jax.data.layouts import Record, detected, to_record
from dpo_jax.data.messages import BadRow, Messages, Part, is_chat, messages_of, need, texts_of
from dpo_jax.data.readers import reader_of, value_of
from dpo_jax.data.records import text_notes
from dpo_jax.data.report import clean
from dpo_jax.data.stored import conversation
from dpo_jax.data.templates import Codec, codec, template_source, tokenize
from dpo_jax.data.tokenizer import Tokenizer
from dpo_jax.errors import UserError
from dpo_jax.evaluation.generate import Decoding, generate
from dpo_jax.hf.tensors import SIDE_FILES, local_folder
from dpo_jax.hf.tokenizer import generation_settings
from dpo_jax.model.decoder import Params
from dpo_jax.model.spec import DecoderSpec

Prompt = str | Messages
T = TypeVar("T")


class Asked(NamedTuple):
    """A prompt, and where it stands: `file:line`."""

    prompt: Prompt
    where: str


class Question(NamedTuple):
    """A prompt, where it stands (`file:line`), and what a good answer to it matches."""

    prompt: Prompt
    where: str
    good: re.Pattern[str]


# ---------------------------------------------------------------------------------------------- files


def read_prompts(path: str) -> list[Asked]:
    """The `prompt` of each row of a JSONL file (or of another kind of file that preference data may come in).

    Raises:
      UserError: the file, or one of its rows, is not as it must be.
    """
    return _read(path, lambda row, where: Asked(_prompt(row), where))


def read_questions(path: str, *, as_chat: bool = False) -> list[Question]:
    """The questions of a file; `as_chat` as of `read_comparable`.

    Raises:
      UserError: the file, or one of its rows, is not as it must be.
    """
    return _read(path, lambda row, where: Question(_turned(_prompt(row), as_chat), where, _pattern(row)))


def read_answered(path: str, needing: Sequence[str] = ()) -> list[Asked | Question]:
    """The prompts of a file that a run answers: questions, where it is said what is good, or else of no row.

    Args:
      path: the file.
      needing: settings, as `key=value`, that want to know what is good.

    Raises:
      UserError: the file, or one of its rows, is not as it must be; or it does not say what is good, which is needed.
    """
    found = _read(path, _asked)
    kinds = [isinstance(one, Question) for one in found]
    if any(kinds) and not all(kinds):
        one, other = found[kinds.index(False)].where, found[kinds.index(True)].where
        raise UserError(f"{one}: missing column: no 'good', which {other} has; give it to all rows, or to none")
    if needing and not all(kinds):
        raise UserError(
            f"{found[0].where}: missing column: no 'good', which {needing[0]} needs: what a good answer matches"
        )
    return found


def _asked(row: Mapping[str, Any], where: str, *, as_chat: bool = False) -> Asked | Question:
    prompt = _turned(_prompt(row), as_chat)
    return Question(prompt, where, _pattern(row)) if "good" in row else Asked(prompt, where)


def read_comparable(path: str, *, as_chat: bool = False) -> tuple[list[Asked | Question], dict[str, list[str]]]:
    """The prompts of a file of prompts, of questions or of preferences; and the answers of the last, by `chosen` and
    `rejected`.

    Args:
      path: the file.
      as_chat: whether texts become a user's message, and dialogues as hh-rlhf writes them turns.

    Raises:
      UserError: the file, or one of its rows, is not as it must be.
    """

    def take(row: Mapping[str, Any], where: str) -> tuple[Asked | Question, tuple[str, str] | None]:
        if (layout := detected(row)) is None:
            return _asked(row, where, as_chat=as_chat), None
        record = to_record(row, layout, file=path, line=0, as_chat=as_chat)
        prompt = _as_texts(record.prompt)
        text_notes([*texts_of(prompt), *texts_of(list(record.completions))])
        first, *_ = record.pairs
        return Asked(prompt, where), (
            _said(record.completions[first.chosen]),
            _said(record.completions[first.rejected]),
        )

    rows = _read(path, take)
    pairs = [pair for _, pair in rows if pair is not None]
    given = {name: [pair[side] for pair in pairs] for side, name in enumerate(("chosen", "rejected"))}
    return [asked for asked, _ in rows], given if len(pairs) == len(rows) else {}


def texts_note(asked: Sequence[Asked | Question], tokenizer: Tokenizer, option: str) -> str | None:
    """That prompts are texts which do without the chat template, in words; None where none is, or there is no template.
    `option` makes messages of them."""
    texts = sum(isinstance(item.prompt, str) for item in asked)
    if not texts or template_source(tokenizer, None) is None:
        return None
    which = "the prompts are texts" if texts == len(asked) else f"{texts:,} of {len(asked):,} prompts are texts"
    return f"note: {which}, and go on without this model's chat template; {option} makes messages of them"


def _turned(prompt: Prompt, as_chat: bool) -> Prompt:
    """The prompt, or where it is a text and `as_chat`, the turns that it is."""
    return (
        _as_texts(in_turns(Answers(prompt, ()), splits=False).prompt) if as_chat and isinstance(prompt, str) else prompt
    )


def _as_texts(prompt: Part) -> Prompt:
    if isinstance(prompt, str) or is_chat(prompt):
        return prompt
    raise BadRow("wrong type", "token ids cannot be asked of another model; give texts or messages")


def _said(answer: Part) -> str:
    """An answer as text: of turns, what the last one says."""
    if isinstance(answer, str):
        return answer
    return str(answer[-1].get("content", "")) if is_chat(answer) else ""


def _read(path: str, take: Callable[[Mapping[str, Any], str], T]) -> list[T]:
    file = Path(path).expanduser()
    taken, where = [], clean(path)
    try:
        for row in reader_of(file, path)(file, path):
            where = f"{clean(path)}:{row.line}"
            taken.append(take(_object(value_of(row)), where))
    except BadRow as error:
        raise UserError(f"{where}: {clean(str(error))}") from error
    except OSError as error:
        raise UserError(f"{clean(path)}: {error.strerror or error}; give a file of prompts") from error
    if not taken:
        raise UserError(f'{clean(path)}: is empty; write rows such as {{"prompt": "..."}}')
    return taken


def _object(value: object) -> Mapping[str, Any]:
    if isinstance(value, BadRow):
        raise value
    if not isinstance(value, Mapping):
        raise BadRow("not an object", 'a row is an object such as {"prompt": "..."}')
    return value


def _prompt(row: Mapping[str, Any]) -> Prompt:
    value = need(row, "prompt", '; write rows such as {"prompt": "..."}')
    return prompt_of(conversation(value, "prompt") if isinstance(value, str) else value)


def prompt_of(value: object) -> Prompt:
    """A text, or a list of messages, as a prompt.

    Raises:
      BadRow: it is neither, or holds what no tokenizer takes.
    """
    prompt = value if isinstance(value, str) else messages_of(value, "prompt")
    text_notes(list(texts_of(prompt)))
    return prompt


def _pattern(row: Mapping[str, Any]) -> re.Pattern[str]:
    pattern = need(row, "good")
    if not isinstance(pattern, str):
        raise BadRow("wrong type", "good is not text; it is a regular expression")
    try:
        return re.compile(pattern, re.DOTALL)
    except (re.error, RecursionError, OverflowError) as error:
        raise BadRow(
            "not a pattern", f"good = {clean(pattern, 60)!r}: {error}; correct the regular expression"
        ) from error


# ---------------------------------------------------------------------------------------------- tokens


def prompt_codec(
    tokenizer: Tokenizer,
    control_tokens: Literal["text", "tokens"] = "text",
    arguments: Mapping[str, Any] | None = None,
) -> Codec:
    """How a tokenizer, with the chat template that it holds and arguments for it, makes tokens of prompts."""
    return codec(tokenizer, template=None, control_tokens=control_tokens, ending="terminator", arguments=arguments)


def prompt_tokens(prompt: Prompt, coder: Codec, where: str = "") -> list[int]:
    """Token ids that ask for an answer to a prompt: the same that stand before the answers in training.

    Messages go through the chat template, which opens the assistant's turn; a text gets BOS if the tokenizer puts one
    before texts. Control tokens in either are plain text unless the codec says otherwise.

    Raises:
      UserError: the prompt is of messages and there is no template, the template refuses it, or no token comes of it;
        names `where`.
    """
    where = where or "prompt"
    if is_chat(prompt) and template_source(coder.tokenizer, coder.template) is None:
        raise UserError(
            f"{where}: messages need a chat template and the tokenizer has none; write the prompt as a text"
        )
    (found,) = tokenize([Record(prompt, (), (), None, {}, where, 1)], coder)
    if isinstance(found, BadRow):
        raise UserError(f"{where}: {clean(str(found))}; write another prompt")
    return found.prompt


def stop_tokens(folder_or_hub_id: str | Path, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Tokens that end an answer: those of generation_config.json, and what the chat template ends a turn with.

    The second is what a chat model is trained to write at the end; some folders forget to list it.
    """
    ids = generation_settings(local_folder(folder_or_hub_id, SIDE_FILES), tokenizer).eos
    turn = prompt_codec(tokenizer).turn.terminator
    return ids if turn is None or turn in ids else (*ids, turn)


def text_of(tokenizer: Tokenizer, tokens: Sequence[int]) -> str:
    """An answer as text, without special tokens, and with its spaces as they are."""
    return tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)


# ---------------------------------------------------------------------------------------------- asking


def answer(
    spec: DecoderSpec,
    params: Params,
    questions: Sequence[Asked | Question],
    coder: Codec,
    *,
    stop: tuple[int, ...],
    max_new_tokens: int,
    batch_size: int = 16,
    mesh: Mesh | None = None,
) -> list[dict[str, Any]]:
    """The model's greedy answer to each prompt, as a row of JSON.

    A row has `prompt`, `answer`, of a question `good` (whether its pattern is found in the answer), and `finished`
    (whether the model ended by itself; an answer that was cut off is judged as it is).
    """
    prompts = [prompt_tokens(question.prompt, coder, question.where) for question in questions]
    decoding = Decoding(max_new_tokens=max_new_tokens, stop=stop)
    answers = generate(spec, params, prompts, decoding, batch_size=batch_size, mesh=mesh)
    rows = []
    for question, given in zip(questions, answers, strict=True):
        text = text_of(coder.tokenizer, given.tokens)
        good = {"good": question.good.search(text) is not None} if isinstance(question, Question) else {}
        rows.append({"prompt": question.prompt, "answer": text, **good, "finished": given.finished})
    return rows


def rated(answers: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """`pass_rate`, the good answers among all, from 0 to 1; nothing where nobody says what is good."""
    good = [row["good"] for row in answers if "good" in row]
    return {"pass_rate": sum(good) / len(good)} if good else {}
