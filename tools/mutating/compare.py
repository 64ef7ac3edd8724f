"""One row, made into tokens by dpo_jax and by transformers' own `apply_chat_template`, and what differs."""

import functools
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from dpo_jax.data.encode import encode
from dpo_jax.data.layouts import Record
from dpo_jax.data.messages import BadRow
from dpo_jax.data.readers import Row
from dpo_jax.data.records import RowRules, Stretch, read_record
from dpo_jax.data.report import AS_TEXT, LEFT_OUT
from dpo_jax.data.settings import DataSettings
from dpo_jax.data.sources import tables
from dpo_jax.data.templates import Codec, Tokens, codec, tokenize
from dpo_jax.errors import UserError
from tools.mutating.rows import Case, Turn

EQUAL, REFUSED, CHOICE, OTHER = "equal", "refused", "choice", "other"
WAYS = {
    "sanitized": "control tokens in texts stay text",
    "mixed": "control tokens of others stay text",
    "continued": "an answer goes on with the prompt's last turn",
}
"""Ways to ask transformers for ids other than plainly, and the choice that each of them is. In "mixed", the prompt is
sanitized and the answer is not."""
TEXTS = "arguments are JSON text where the template takes no objects"


class Outcome(NamedTuple):
    """One of the four, and why."""

    verdict: str
    detail: str = ""


def compare(case: Case, tokenizer: Any, folder: Path) -> Outcome:
    """What becomes of a row, next to what its template makes of the conversations that it means."""
    coder = _coder(
        tokenizer, case.settings.get("control_tokens", "text"), case.settings.get("score_tool_results", False)
    )
    made = _ours(case, coder, folder)
    if isinstance(made, BadRow):
        return Outcome(REFUSED, made.kind)
    if any(kind == AS_TEXT for kind, _ in made.notes):
        return _whole_file(case, tokenizer, folder)
    last = ""
    for way in dict.fromkeys(("plain", *case.ways)):
        try:
            prompt, wholes, texts = _theirs_somehow(case, tokenizer, way)
        except Exception as error:  # a template raises what it likes
            last = last or f"the template refuses it ({type(error).__name__}: {error}) and dpo_jax does not"
            continue
        last, choice = _difference(case, made, prompt, wholes, coder)
        if not last:
            if trouble := _silent(case, made, wholes, tokenizer) or _scored(case, made, tokenizer):
                return Outcome(OTHER, trouble)
            choice = TEXTS if texts else case.choice or WAYS.get(way) or choice
            return Outcome(CHOICE, choice) if choice else Outcome(EQUAL)
    return Outcome(OTHER, last)


@functools.lru_cache(128)
def _coder(tokenizer: Any, control_tokens: Literal["text", "tokens"], score_tool_results: bool) -> Codec:
    return codec(
        tokenizer,
        template=None,
        control_tokens=control_tokens,
        ending="template",
        score_tool_results=score_tool_results,
    )


def _ours(case: Case, coder: Codec, folder: Path) -> Tokens | BadRow:
    row = Row("rows", 1, json.dumps(case.row).encode())
    if case.parquet:
        row = _through_parquet(case, folder)
    record = read_record(row, Stretch(None, [row]), RowRules())
    return tokenize([record], coder)[0] if isinstance(record, Record) else record


def _through_parquet(case: Case, folder: Path) -> Row:
    """The row as Parquet gives it back where another row has other arguments and other tools."""
    import pyarrow
    from pyarrow import parquet

    other = json.loads(json.dumps(case.row))
    other["chosen"][0]["tool_calls"][0]["function"]["arguments"] = {"day": 3, "unit": "mm"}
    other["tools"][0]["function"]["parameters"] |= {"properties": {"day": {"type": "integer", "minimum": 1}}}
    path = folder / "rows.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([case.row, other]), path)
    return next(iter(tables(str(path))[0].rows()))


def _whole_file(case: Case, tokenizer: Any, folder: Path) -> Outcome:
    """Rendered text that stays text: a file of such rows must be refused."""
    path = folder / "rows.jsonl"
    path.write_text(json.dumps(case.row) + "\n", "utf-8")
    try:
        encode(str(path), tokenizer, DataSettings(train=str(path), max_length=4096, workers=0))
    except UserError:
        return Outcome(REFUSED, AS_TEXT)
    return Outcome(OTHER, "a file of rendered text is taken as plain text")


def _theirs_somehow(case: Case, tokenizer: Any, way: str) -> tuple[list[int], list[list[int]], bool]:
    """What `_theirs` gives; and whether arguments had to be JSON text for it."""
    try:
        return *_theirs(case, tokenizer, way), False
    except TypeError:
        return *_theirs(case, tokenizer, way, texts=True), True


def _theirs(case: Case, tokenizer: Any, way: str, *, texts: bool = False) -> tuple[list[int], list[list[int]]]:
    """Ids of the prompt as it is asked, and of the conversation with each answer."""

    def ids(turns: list[Turn], *, safe: bool = way == "sanitized", **how: bool) -> list[int]:
        if safe:
            how["sanitize_control_tokens"] = True
        turns = [_with_texts(turn) for turn in turns] if texts else turns
        return tokenizer.apply_chat_template(turns, tools=case.tools, return_dict=False, **case.kwargs, **how)

    if way == "continued":
        begun = case.prompt[-1]
        turns = [{**answer[0], "content": begun["content"] + answer[0]["content"]} for answer in case.answers]
        wholes = [ids([*case.prompt[:-1], turn, *answer[1:]]) for turn, answer in zip(turns, case.answers, strict=True)]
        try:
            return ids(case.prompt, continue_final_message=True), wholes
        except ValueError:  # transformers does not find the turn that is to be continued
            return [], wholes
    prompt = ids(case.prompt, add_generation_prompt=case.answers[0][0]["role"] == "assistant")
    wholes = [ids(case.prompt + answer) for answer in case.answers]
    if way != "mixed":
        return prompt, wholes
    end = _shared([prompt, *wholes])
    safe = ids(case.prompt, safe=True, add_generation_prompt=True)
    head = safe[: len(safe) - (len(prompt) - end)]
    return safe, [head + whole[end:] for whole in wholes]


def _with_texts(turn: Turn) -> Turn:
    if not turn.get("tool_calls"):
        return turn
    calls = json.loads(json.dumps(turn["tool_calls"]))
    for call in calls:
        call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
    return {**turn, "tool_calls": calls}


def _shared(sequences: list[list[int]]) -> int:
    return len(os.path.commonprefix(sequences))


def _difference(case: Case, made: Tokens, prompt: list[int], wholes: list[list[int]], coder: Codec) -> tuple[str, str]:
    """What differs, nothing if the ids are the same and the prompt ends where all of theirs part; and a choice."""
    choice = ""
    for ids, whole in zip(made.completions, wholes, strict=True):
        found = made.prompt + ids
        if found != whole and case.settings.get("control_tokens") == "tokens":
            whole, choice = _with_one_end(whole, coder), "a rendered answer ends with one token"
        if found != whole:
            at = _shared([found, whole])
            one, other = (_text(coder.tokenizer, part[max(at - 5, 0) : at + 20]) for part in (found, whole))
            return f"{one!r} where the template has {other!r}", ""
    end = _shared([prompt, *wholes])
    text = _text(coder.tokenizer, made.prompt)
    if "continued" in case.ways and _squeezed(text).endswith(_squeezed(case.prompt[-1]["content"])):
        return "", choice
    if len(made.prompt) > end and all(whole[: len(made.prompt)] == made.prompt for whole in wholes):
        return "", choice or "all that is said before the answer is the prompt's"
    if made.prompt != wholes[0][:end] and prompt:
        return f"the prompt ends after {text!r}, not {_text(coder.tokenizer, wholes[0][:end])!r}", ""
    return "", choice


def _with_one_end(whole: list[int], coder: Codec) -> list[int]:
    """Without what a template writes after the end of a turn; with an end where it has none."""
    if coder.turn.terminator is None:
        return whole + [coder.eos[1]] if coder.eos else whole
    return whole[: len(whole) - len(coder.turn.rest)]


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _text(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False)


def _silent(case: Case, made: Tokens, wholes: list[list[int]], tokenizer: Any) -> str:
    """Words that the template left out without a note."""
    if any(kind == LEFT_OUT for kind, _ in made.notes):
        return ""
    for answer, whole in zip(case.answers, wholes, strict=True):
        text = _text(tokenizer, whole)
        for word in _words([*case.prompt, *answer]):
            if word not in text:
                return f"{word!r} is left out and nothing is said of it"
    return ""


def _scored(case: Case, made: Tokens, tokenizer: Any) -> str:
    """Words that are scored and should not be, or the other way round."""
    for answer, ids, unscored in zip(case.answers, made.completions, made.unscored, strict=True):
        hidden = {place for first, last in unscored for place in range(first, last)}
        text = _text(tokenizer, [token for place, token in enumerate(ids) if place not in hidden])
        whole = _text(tokenizer, made.prompt + ids)
        own = set(_words([turn for turn in answer if turn["role"] == "assistant"]))
        others = set(_words([*case.prompt, *(turn for turn in answer if turn["role"] != "assistant")])) - own
        if missing := [word for word in own if word in whole and word not in text]:
            return f"{missing[0]!r} is the assistant's and not scored"
        if not case.settings.get("score_tool_results") and (found := [word for word in others if word in text]):
            return f"{found[0]!r} is not the answer's and scored"
    return ""


def _words(turns: list[Turn]) -> Iterator[str]:
    """The words of contents, reasoning and calls."""
    for turn in turns:
        said = [turn.get("content", ""), turn.get("reasoning_content", "")]
        for item in turn.get("tool_calls", ()):
            said += [item["function"]["name"], *map(str, _leaves(item["function"]["arguments"]))]
        for text in said:
            yield from (word for word in text.split() if word.isalpha() and len(word) == 8)


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        for item in value.values():
            yield from _leaves(item)
    else:
        yield value
