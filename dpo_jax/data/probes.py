"""What a chat template does, found out by rendering a few made-up conversations: never from a list of names.

A *turn mark* is a control token that begins or ends a turn, or a text. Text of a row may not hold one as a token. Other
control tokens (of reasoning, of calls) are words of the assistant's.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dpo_jax.data.messages import Messages, shared_length
from dpo_jax.data.strangers import apply_template, ids_of
from dpo_jax.data.tokenizer import Tokenizer
from dpo_jax.errors import UserError

Render = Callable[..., str | None]

WORDS = {role: f"dpojaxprobe{role}" for role in ("system", "user", "assistant", "tool", "name", "value", "reason")}
"""What is said in the made-up conversations: a word for each role, for the name and the argument of a call, and for
reasoning."""


@dataclass(frozen=True)
class Frame:
    """What a template writes around the turns of a conversation.

    Attributes:
      marks: control tokens that mark a turn or a text.
      ends: marks that end a turn of the assistant's.
      header: text that ends a user's turn and opens the assistant's; empty where no control token is in it.
      text_arguments: whether calls are written only if their arguments are JSON text.
    """

    marks: frozenset[str] = frozenset()
    ends: frozenset[str] = frozenset()
    header: str = ""
    text_arguments: bool = False


@dataclass(frozen=True)
class Turn:
    """How a template ends an assistant's turn: a special token (None: it has none), and the ids that follow it."""

    terminator: int | None = None
    rest: tuple[int, ...] = ()


def message(role: str, **fields: Any) -> dict[str, Any]:
    """A turn of a made-up conversation."""
    return {"role": role, "content": WORDS[role], **fields}


def call(arguments: object) -> dict[str, Any]:
    """A turn that says nothing and calls a tool."""
    function = {"name": WORDS["name"], "arguments": arguments}
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": "a1b2c3d4e", "type": "function", "function": function}],
    }


def renderer(tokenizer: Tokenizer, template: str | None, arguments: Mapping[str, Any]) -> Render:
    """`render(messages, asking=False)` gives the text of a conversation; None where the template refuses it.

    Raises:
      UserError: the template does not end, or writes without end.
    """
    given = {"chat_template": template, "tokenize": False, **arguments}

    def render(messages: Messages, asking: bool = False) -> str | None:
        try:
            return apply_template(tokenizer, messages, "a probe", add_generation_prompt=asking, **given)
        except UserError:
            raise
        except Exception:  # a template may raise anything; rows that need it will say so, with file and line
            return None

    return render


def frame_of(render: Render, tokenizer: Tokenizer, control: re.Pattern) -> Frame:
    """Find out how a template frames turns.

    Args:
      render: of `renderer`.
      tokenizer: of transformers.
      control: finds control tokens in a text.
    """
    look = _Probe(render, control)
    special = frozenset(token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
    named = (token for token in tokenizer.special_tokens_map.values() if isinstance(token, str))
    user, assistant, system = message("user"), message("assistant"), message("system")
    text_arguments = look.writes(call(json.dumps(_ARGUMENTS))) and not look.writes(call(_ARGUMENTS))
    calling = call(json.dumps(_ARGUMENTS) if text_arguments else _ARGUMENTS)
    around = look.gaps([user, assistant, user, assistant]) or look.gaps([user, assistant])
    asked = look.gaps([user], asking=True)
    after_user = look.tokens((look.gaps([user]) or [""])[-1])
    after_answer = look.tokens((look.gaps([user, assistant]) or [""])[-1])
    marks = set(named)
    for found in (around[::2], look.gaps([system, user])[:2], look.gaps([user, user])[1:]):
        marks |= {token for gap in found for token in look.tokens(gap)}
    opening = {token for gap in around[2:-1:2] for token in look.tokens(gap)[:1] if not after_answer}
    for gap in (*around[1:2], *asked[1:]):
        opening |= look.opener(gap, after_user)
    called = look.gaps([user, calling])
    for gap in look.gaps([user, calling, message("tool"), assistant])[3:4]:
        opening |= look.opener(gap, look.tokens(called[-1] if called else ""))
    for gap in look.gaps([user, assistant, message("tool"), assistant])[2:3]:
        opening |= look.opener(gap, after_answer)
    plain = marks | opening | {token for gap in (*around, *asked) for token in look.tokens(gap)}
    thought = look.gaps([user, message("assistant", reasoning_content=WORDS["reason"])])
    inside, last = look.inside(called, thought, plain, special)
    ends = {look.tokens(gap)[0] for gap in (*around[2::2], *called[-1:]) if look.tokens(gap)} | last
    return Frame(
        marks=frozenset((marks | opening | special) - inside),
        ends=frozenset(ends - opening - inside),
        header=look.header(around, asked),
        text_arguments=text_arguments,
    )


_ARGUMENTS = {"key": WORDS["value"]}


@dataclass(frozen=True)
class _Probe:
    """A template, looked at through its control tokens."""

    render: Render
    control: re.Pattern

    def tokens(self, text: str) -> list[str]:
        """Control tokens of a text, in order."""
        return self.control.findall(text)

    def writes(self, turn: Mapping[str, Any]) -> bool:
        """Whether name and argument of a call are in what is written."""
        text = self.render([message("user"), turn]) or ""
        return WORDS["name"] in text and WORDS["value"] in text

    def gaps(self, messages: Messages, asking: bool = False) -> list[str]:
        """Text before, between and after what the turns say; none where something that is said is not written.

        user, call   ->   before the user's words, before the name, between name and argument, after the argument
        """
        text, at, found = self.render(messages, asking), 0, []
        if text is None:
            return []
        for word in (word for turn in messages for word in _words(turn)):
            start = text.find(word, at)
            if start < 0:
                return []
            found.append(text[at:start])
            at = start + len(word)
        return [*found, text[at:]]

    def opener(self, gap: str, before: list[str]) -> set[str]:
        """The control token that opens the next turn: the first one after those that end the turn before."""
        tokens = self.tokens(gap)
        rest = tokens[shared_length(tokens, before) :]
        return set(rest[:1])

    def inside(
        self, called: list[str], thought: list[str], plain: set[str], special: frozenset[str]
    ) -> tuple[set[str], set[str]]:
        """Control tokens that are written in calls and reasoning alone; and the one that ends a turn of calls."""
        found = [token for gap in (*called[1:], *thought[1:-1]) for token in self.tokens(gap)]
        last = {token for token in self.tokens(called[-1] if called else "")[-1:] if token in special}
        return set(found) - plain - last, last

    def header(self, around: list[str], asked: list[str]) -> str:
        """What stands between a user's words and the assistant's, whether they are asked for or given."""
        if len(around) < 2 or len(asked) < 2:
            return ""
        text = around[1][: shared_length(around[1], asked[1])].strip()
        return text if self.control.search(text) else ""


def _words(turn: Mapping[str, Any]) -> list[str]:
    words = [WORDS["reason"]] if "reasoning_content" in turn else []
    words += [turn["content"]] if turn["content"] else []
    return words + ([WORDS["name"], WORDS["value"]] if "tool_calls" in turn else [])


def turn_of(render: Render, tokenizer: Tokenizer, special: frozenset[int]) -> Turn:
    """Render a probe and look at what the template writes after the assistant's words."""
    answer = message("assistant")
    text = render([message("user"), answer])
    if text is None:
        return Turn()
    until = text.rfind(answer["content"]) + len(answer["content"])
    ids, head = ids_of(tokenizer, [text, text[:until]], add_special_tokens=False)
    tail = range(shared_length(ids, head), len(ids))
    at = next((at for at in tail if ids[at] in special), None)
    return Turn() if at is None else Turn(ids[at], tuple(ids[at + 1 :]))


def begins(render: Render, tokenizer: Tokenizer, before: tuple[int, ...]) -> bool:
    """Whether the template writes these ids at the beginning of a conversation."""
    (ids,) = ids_of(tokenizer, [render([message("user")]) or ""], add_special_tokens=False)
    return bool(before) and tuple(ids[: len(before)]) == before
