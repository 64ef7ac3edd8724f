"""Conversations as a chat template writes them, and what became of each thing that was said.

What is said is *signed*: a character that no text has is put behind each line of a content, each name and argument of a
call, and the conversation is rendered once more. Where the signs are tells what the template left out, where a
prefilled answer ends, and which characters are of tools and users. It is believed only if the text without signs is the
text that is trained on.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from dpo_jax.data.layouts import Record
from dpo_jax.data.messages import BadRow, Messages, arguments_of, shared_length, texts_of
from dpo_jax.data.probes import Frame
from dpo_jax.data.report import LEFT_OUT, clean
from dpo_jax.data.strangers import apply_template
from dpo_jax.data.tokenizer import Tokenizer
from dpo_jax.errors import UserError

Notes = tuple[tuple[str, str], ...]

FIRST, LAST = 0x100000, 0x10FFFD
_SIGNS = re.compile(f"[{chr(FIRST)}-{chr(LAST)}]")
_TAG = r"</?[^<>\s]{1,40}>"
REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names of what an assistant thought, as transformers knows them."""


@dataclass(frozen=True)
class Voice:
    """How conversations of a tokenizer are written.

    Attributes:
      tokenizer: of transformers.
      template: chat template that is used instead of the tokenizer's own.
      frame: what the template writes around turns.
      control: finds control tokens in a text.
      marks: finds those that mark turns.
      protect: whether control tokens in what is said are to stay text (the assistant's own ones but for turn marks).
      score_all: whether turns of others inside an answer are scored.
      arguments: of the run, for the template; a row's own go before them.
    """

    tokenizer: Tokenizer
    template: str | None
    frame: Frame
    control: re.Pattern
    marks: re.Pattern
    protect: bool
    score_all: bool
    arguments: Mapping[str, Any] = field(default_factory=dict)


class Written(NamedTuple):
    """A conversation with an answer as text, and the characters of the answer that are not the assistant's.

    `asked` characters are the prompt's, if the prompt alone is written in another way: its last words end at `said`.
    """

    text: str
    foreign: tuple[tuple[int, int], ...] = ()
    said: int = 0
    asked: int = 0


class Chats(NamedTuple):
    """A prompt as it is asked, and the conversation with each answer.

    `marked` texts have transformers' own marks around control tokens that are to stay text.
    """

    prompt: str
    answers: tuple[Written, ...]
    marked: bool
    notes: Notes


class Sign(NamedTuple):
    """What a sign stands behind."""

    char: str
    turn: int
    what: str
    text: str


def written(record: Record, names: Sequence[str], voice: Voice) -> Chats:
    """The conversations of a record as texts.

    Args:
      record: a prompt of messages, with or without completions.
      names: of the completions, for what is said about them.
      voice: how they are written.

    Raises:
      BadRow: the template refuses them, or writes nothing of an answer, or not where a prefilled answer ends.
    """
    given = [_turns(part, voice.frame) for part in (record.prompt, *record.completions)]
    note = control_note(given, record, voice)
    scribe = _Scribe(record, voice, protect=voice.protect and bool(note))
    prompt, answers = _with_shared_results(given[0], given[1:])
    if _is_prefill(prompt, answers):
        return Chats(*_prefilled(prompt, answers, names, scribe), scribe.protect, note + tuple(scribe.notes))
    asking = all(answer[0]["role"] == "assistant" for answer in answers)
    text = scribe.text(prompt, asking=asking)
    made = [_checked(scribe, prompt, answer, name, asked=text) for answer, name in zip(answers, names, strict=True)]
    if any(shared_length(text, answer.text) < answer.said for answer in made):
        text = made[0].text[: made[0].asked]
        if any(answer.text[: answer.asked] != text for answer in made):
            raise BadRow("template error", "the chat template writes the prompt in another way before each answer")
    return Chats(text, tuple(made), scribe.protect, note + tuple(scribe.notes))


def control_note(given: Sequence[Messages], record: Record, voice: Voice) -> Notes:
    """The first control token in what is said that is none of the assistant's own."""
    others = (record.tools, record.chat_template_kwargs)
    turns = [turn for part in given for turn in part]
    looked = [(voice.control, part) for part in others if part]
    looked += [(voice.marks if turn["role"] == "assistant" else voice.control, turn) for turn in turns]
    for pattern, part in looked:
        for text in texts_of(part):
            if found := pattern.search(text):
                fate = "kept as text" if voice.protect else "a real control token (data.control_tokens)"
                return (("control-token text", f"{found[0]!r} in a text: {fate}"),)
    return ()


def _turns(part: object, frame: Frame) -> Messages:
    """The messages of a part; arguments of calls as objects, or as JSON text where the template takes no others."""
    turns = [turn for turn in part if isinstance(turn, dict)] if isinstance(part, list) else []
    return [{**turn, "tool_calls": _calls(turn, frame)} if turn.get("tool_calls") else turn for turn in turns]


def _calls(turn: Mapping[str, Any], frame: Frame) -> list[dict[str, Any]]:
    calls = []
    for call in turn["tool_calls"]:
        function = call.get("function", call)
        arguments = function.get("arguments")
        if not frame.text_arguments:
            arguments = arguments_of(arguments, "arguments")
        elif not isinstance(arguments, str):
            arguments = json.dumps(arguments or {}, ensure_ascii=False)
        function = {**function, "arguments": arguments}
        calls.append({**call, "function": function} if "function" in call else function)
    return calls


def _with_shared_results(prompt: Messages, answers: list[Messages]) -> tuple[Messages, list[Messages]]:
    """Results of tools with which all answers begin are asked with, not answered."""
    first = answers[0] if answers else []
    while first and first[0]["role"] != "assistant" and all(answer[0] == first[0] for answer in answers):
        prompt, answers = [*prompt, first[0]], [answer[1:] for answer in answers]
        first = answers[0]
    return prompt, answers


def _is_prefill(prompt: Messages, answers: list[Messages]) -> bool:
    """Whether answers go on with a turn that the prompt began."""
    begun = bool(prompt) and prompt[-1]["role"] == "assistant" and not prompt[-1].get("tool_calls")
    return begun and all(answer[0]["role"] == "assistant" for answer in answers)


def _is_plain(chat: Messages, record: Record) -> bool:
    """Whether nothing but contents is said: no calls, reasoning or tools."""
    fields = ("tool_calls", *REASONING)
    return not record.tools and not any(
        turn["role"] in ("tool", "function") or any(turn.get(name) for name in fields) for turn in chat
    )


# ------------------------------------------------------------------------------------------------ prefilled answers


def _prefilled(
    prompt: Messages, answers: list[Messages], names: Sequence[str], scribe: "_Scribe"
) -> tuple[str, tuple[Written, ...]]:
    """A prompt whose last turn is the assistant's, up to where that turn ends; and the answers that go on there."""
    before, begun = prompt[:-1], prompt[-1]
    border = Sign(chr(LAST), len(before), "prefill", "")
    if not answers:
        signed = scribe.text([*before, {**begun, "content": begun.get("content", "") + border.char}])
        return _until(signed, border), ()
    made, heads = [], []
    for answer, name in zip(answers, names, strict=True):
        if any(answer[0].get(key) for key in REASONING) and begun.get("content", "").strip():
            raise BadRow("wrong type", f"{name} has reasoning, and the prompt has begun what is said after it")
        whole = {**begun, **answer[0], "content": begun.get("content", "") + answer[0].get("content", "")}
        parts = {**whole, "content": begun.get("content", "") + border.char + answer[0].get("content", "")}
        made.append(_checked(scribe, before, [whole, *answer[1:]], name, asked="", signed=[parts, *answer[1:]]))
        heads.append(_until(scribe.text([*before, parts, *answer[1:]]), border))
        if heads[-1] != heads[0] or not made[-1].text.startswith(heads[0]):
            raise BadRow("template error", "the chat template writes the turn that the prompt begins as each answer is")
    return heads[0], tuple(made)


def _until(signed: str, border: Sign) -> str:
    if border.char not in signed:
        raise BadRow("template error", "the chat template leaves out the assistant's turn that the prompt begins")
    return unsigned(signed[: signed.index(border.char)])


# ------------------------------------------------------------------------------------------------ checks


def _checked(
    scribe: "_Scribe",
    prompt: Messages,
    answer: Messages,
    name: str,
    *,
    asked: str,
    signed: Messages | None = None,
) -> Written:
    """A conversation with an answer as text, where what is left out is noted.

    Args:
      scribe: writes it.
      prompt: turns before the answer.
      answer: its turns.
      name: of the answer.
      asked: text of the prompt alone.
      signed: the answer's turns with a sign that is there already.

    Raises:
      BadRow: nothing of the answer is written, or it cannot be told which part is not the assistant's.
    """
    chat = [*prompt, *answer]
    text = scribe.text(chat)
    several = len(answer) > 1 and not scribe.voice.score_all
    plain = not several and not signed and text.startswith(asked) and _is_plain(chat, scribe.record)
    if plain and _in_order([turn.get("content", "") for turn in scribe.protected(chat)], text):
        return Written(text)
    shadow, signs = scribe.signed([*prompt, *(signed or answer)])
    true = unsigned(shadow) == text
    if not true and (several or signed):
        raise BadRow("template error", f"the chat template writes {name} so that its turns cannot be told apart")
    missing = [sign for sign in signs if (sign.char not in shadow if true else sign.text not in text)]
    own = [sign for sign in signs if sign.turn >= len(prompt) and chat[sign.turn]["role"] == "assistant"]
    if own and all(sign in missing for sign in own):
        what = ", ".join(dict.fromkeys(sign.what for sign in own))
        raise BadRow("empty completion", f"the chat template writes nothing of {name} (its {what})")
    _note_missing(scribe, missing, len(prompt), name)
    if not true:
        return Written(text)
    foreign = tuple(_foreign(scribe, chat, len(prompt), shadow, signs)) if several else ()
    return Written(text, foreign, *_prompt_end(scribe, chat, len(prompt), shadow, signs))


def _prompt_end(scribe: "_Scribe", chat: Messages, start: int, shadow: str, signs: Sequence[Sign]) -> tuple[int, int]:
    """Characters of the text up to the prompt's last words, and up to where the answer begins."""
    places = [shadow.index(sign.char) for sign in signs if sign.char in shadow and 0 <= sign.turn < start]
    if not places:
        return 0, 0
    last, asking = max(places), chat[start]["role"] == "assistant"
    end = last + 1 + _asked_again(scribe, chat[:start], shadow[last + 1 :], shadow[last], asking=asking)
    return len(unsigned(shadow[:last])), len(unsigned(shadow[:end]))


def _in_order(contents: Sequence[str], text: str) -> bool:
    """Whether all contents are in the text, one after the other."""
    at = 0
    for content in map(str.strip, contents):
        at = text.find(content, at)
        if at < 0:
            return False
        at += len(content)
    return True


def _note_missing(scribe: "_Scribe", missing: Sequence[Sign], start: int, name: str) -> None:
    """Say what a template leaves out, once for each row; what is left out of the prompt may be so for each answer."""
    parts = []
    for sign in missing:
        where = name if sign.turn >= start else "the prompt" if sign.turn >= 0 else "the row"
        shown = f" {clean(sign.text, 30)!r}" if sign.what == "content" else ""
        parts.append(f"{sign.what}{shown} of {where}")
    if parts and not scribe.notes:
        some = list(dict.fromkeys(parts))
        scribe.notes.append((LEFT_OUT, "; ".join(some[:3]) + (f"; {len(some) - 3} more" if len(some) > 3 else "")))


# ------------------------------------------------------------------------------------------------ whose words


def _foreign(
    scribe: "_Scribe", chat: Messages, start: int, shadow: str, signs: Sequence[Sign]
) -> Iterator[tuple[int, int]]:
    """Characters of an answer that are not the assistant's: from the end of its turn to where it is asked again.

    call <|im_end|> \\n<|im_start|>user\\n result <|im_end|>\\n<|im_start|>assistant\\n answer <|im_end|>
                   [ not the assistant's                                              ]
    """
    found = sorted((shadow.index(sign.char), sign) for sign in signs if sign.char in shadow and sign.turn >= 0)
    asked = [place for place, sign in found if sign.turn < start]
    place, turn, others = max(asked, default=0), start, []
    for at, sign in [*(item for item in found if item[1].turn >= start), (len(shadow), None)]:
        if sign is not None and chat[sign.turn]["role"] != "assistant":
            others.append((at, sign.turn))
            continue
        if others or (sign is not None and sign.turn != turn):
            begin = place + 1 + _turn_end(shadow[place + 1 : others[0][0] if others else at], scribe.voice)
            last = others[-1][0] if others else place
            until = max([before for _, before in others] or [sign.turn - 1 if sign else turn])
            end = last + 1 + _asked_again(scribe, chat[: until + 1], shadow[last + 1 : at], shadow[last])
            if begin < end:
                yield len(unsigned(shadow[:begin])), len(unsigned(shadow[:end]))
        place, turn, others = at, sign.turn if sign else turn, []


def _turn_end(gap: str, voice: Voice) -> int:
    """Where the assistant's turn ends in the text before another's words: after its end, or before the next mark."""
    for found in voice.marks.finditer(gap):
        if gap[found.start() - 1 : found.start()] != _MARKED:
            return found.end() if found[0] in voice.frame.ends else found.start()
    return 0


_MARKED = "\U000f0000"
"""What transformers puts before a control token that is to stay text."""


def _asked_again(scribe: "_Scribe", chat: Messages, after: str, last: str, *, asking: bool = True) -> int:
    """Characters after the last words of a conversation, with this sign, that are there before somebody goes on."""
    shadow, _ = scribe.signed(chat, asking=asking)  # each thing has the same sign as in the whole conversation
    if last not in shadow:
        return 0
    return shared_length(after, shadow[shadow.index(last) + 1 :])


# ------------------------------------------------------------------------------------------------ writing


def unsigned(text: str) -> str:
    """The text without signs."""
    return _SIGNS.sub("", text)


@dataclass
class _Scribe:
    """Renders conversations of one row, and collects what is to be said about them."""

    record: Record
    voice: Voice
    protect: bool
    notes: list[tuple[str, str]] = field(default_factory=list)

    def text(self, chat: Messages, *, asking: bool = False, tools: object = None) -> str:
        """The conversation as text."""
        tools = self.record.tools if tools is None else tools
        try:
            return apply_template(
                self.voice.tokenizer,
                self.protected(chat),
                f"{clean(self.record.file, 400)}:{self.record.line}",
                tools=self._others(tools),
                chat_template=self.voice.template,
                add_generation_prompt=asking,
                tokenize=False,
                **{**self.voice.arguments, **self._others(self.record.chat_template_kwargs)},
            )
        except UserError:  # it does not end
            raise
        except Exception as error:  # templates raise what they like: Jinja's errors, their own, TypeError, KeyError
            raise BadRow("template error", f"{type(error).__name__}: {error}") from error

    def signed(self, chat: Messages, *, asking: bool = False) -> tuple[str, list[Sign]]:
        """The conversation with signs, empty if the template refuses it so; and the signs."""
        signer = _Signer(self.voice.control)
        turns = [signer.turn(turn, index) for index, turn in enumerate(chat)]
        tools = [signer.tool(tool) for tool in self.record.tools] if self.record.tools else None
        try:
            return self.text(turns, asking=asking, tools=tools), signer.signs
        except BadRow:
            return "", signer.signs

    def protected(self, chat: Messages) -> Messages:
        """The conversation, where control tokens that are to stay text are marked as such."""
        if not self.protect:
            return chat
        patterns = (self.voice.marks if turn["role"] == "assistant" else self.voice.control for turn in chat)
        return [protect(turn, pattern) for turn, pattern in zip(chat, patterns, strict=True)]

    def _others(self, value: object) -> Any:
        return protect(value, self.voice.control) if self.protect else value


def protect(value: object, pattern: re.Pattern) -> Any:
    """The value, where what the pattern finds in its texts and keys is marked to stay text."""
    from transformers.utils.chat_template_utils import mark_control_tokens

    if isinstance(value, Mapping):
        return {protect(key, pattern): protect(item, pattern) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [protect(item, pattern) for item in value]
    return mark_control_tokens(value, pattern)


class _Signer:
    """Puts signs behind what is said."""

    def __init__(self, control: re.Pattern):
        self.parts = re.compile(f"({control.pattern}|{_TAG}|\n)")
        self.signs: list[Sign] = []

    def turn(self, turn: Mapping[str, Any], index: int) -> dict[str, Any]:
        """A turn with signs behind each line, each stretch between tags, and each part of a call."""
        signed = dict(turn)
        for name in ("content", *REASONING):
            if isinstance(turn.get(name), str):
                what = name if name == "content" else "reasoning"
                signed[name] = "".join(
                    part if self.parts.fullmatch(part) else self._sign(part, index, what)
                    for part in self.parts.split(turn[name])
                    if part
                )
        if turn.get("tool_calls"):
            signed["tool_calls"] = [self._call(call, index) for call in turn["tool_calls"]]
        return signed

    def tool(self, tool: Mapping[str, Any]) -> dict[str, Any]:
        """A tool with a sign behind its name."""
        held = tool.get("function", tool)
        if not isinstance(held, Mapping) or not isinstance(held.get("name"), str):
            return dict(tool)
        named = {**held, "name": self._sign(held["name"], -1, "tools")}
        return {**tool, "function": named} if "function" in tool else named

    def _call(self, call: Mapping[str, Any], index: int) -> dict[str, Any]:
        function = call.get("function", call)
        name = self._sign(function["name"], index, "tool_calls")
        function = {**function, "name": name, "arguments": self._arguments(function.get("arguments"), index)}
        return {**call, "function": function} if "function" in call else function

    def _arguments(self, value: object, index: int) -> Any:
        if isinstance(value, str):
            return self._sign(value, index, "tool_calls")
        if isinstance(value, Mapping):
            return {key: self._arguments(item, index) for key, item in value.items()}
        return [self._arguments(item, index) for item in value] if isinstance(value, list) else value

    def _sign(self, text: str, index: int, what: str) -> str:
        said = text.rstrip()
        number = FIRST + len(self.signs)
        if not _SIGNS.sub("", said).strip() or number >= LAST:
            return text
        self.signs.append(Sign(chr(number), index, what, unsigned(said).strip()))
        return said + chr(number) + text[len(said) :]
