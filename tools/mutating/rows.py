"""Rows of preference data in many shapes, each with the conversations that it means."""

import json
import os
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

Turn = dict[str, Any]
Render = Callable[..., Any]
"""`render(messages, asking=False)`: the text of a conversation."""


@dataclass
class Case:
    """A row, what it means as messages, and what is known about it.

    Attributes:
      row: as it stands in a file.
      prompt: messages that ask.
      answers: messages of each answer, the better one first.
      tools: for the template, as kwargs are.
      kwargs: further arguments of the template.
      settings: of the data, other than the defaults.
      ways: how transformers may be asked for the same ids, beside "plain": see compare.py.
      parquet: whether the row is read from Parquet, in a file with a row of other tools.
      choice: what was decided, and is documented, where the row itself could be read in another way.
    """

    row: Turn
    prompt: list[Turn]
    answers: list[list[Turn]]
    tools: list[Turn] | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    ways: tuple[str, ...] = ("plain",)
    parquet: bool = False
    choice: str | None = None


class Words:
    """Words that come once each, so that they are found again in a text."""

    def __init__(self, rng: random.Random):
        """Draw them from there."""
        self.rng, self.used = rng, set[str]()

    def __call__(self, least: int = 1, most: int = 4) -> str:
        """A few new words."""
        return " ".join(self._word() for _ in range(self.rng.randint(least, most)))

    def _word(self) -> str:
        while True:
            word = "".join(self.rng.choice("bdfgklmnprstvz") + self.rng.choice("aeiou") for _ in range(4))
            if word not in self.used:
                self.used.add(word)
                return word


def user(text: str) -> Turn:
    """A user's turn."""
    return {"role": "user", "content": text}


def assistant(text: str, **fields: Any) -> Turn:
    """A turn of the assistant's."""
    return {"role": "assistant", "content": text, **fields}


def call(words: Words, arguments: Any = None, text: str = "", **fields: Any) -> Turn:
    """A turn that calls a tool."""
    given = {words(1, 1): words()} if arguments is None else arguments
    function = {"name": words(1, 1), "arguments": given}
    return assistant(text, tool_calls=[{"id": "a1b2c3d4e", "type": "function", "function": function}], **fields)


def tool(words: Words, between: str = " ") -> Turn:
    """A tool, as its schema."""
    properties = {words(1, 1): {"type": "string", "description": words()}}
    schema = {"type": "object", "properties": properties, "required": []}
    about = f"{words()}{between}{words()}"
    return {"type": "function", "function": {"name": words(1, 1), "description": about, "parameters": schema}}


def result(words: Words) -> Turn:
    """What a tool answers."""
    return {"role": "tool", "tool_call_id": "a1b2c3d4e", "content": words()}


def pair(prompt: list[Turn], chosen: list[Turn], rejected: list[Turn], **more: Any) -> Case:
    """A row of layout pair that says what it means."""
    row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    tools, kwargs = more.get("tools"), more.get("kwargs")
    row |= ({"tools": tools} if tools else {}) | ({"chat_template_kwargs": kwargs} if kwargs else {})
    return Case(row, prompt, [chosen, rejected], **more)


def simple(words: Words, say: Callable[[str], str] = str, ask: Callable[[str], str] = str, **more: Any) -> Case:
    """One turn each, where `say` changes what is answered and `ask` what is asked."""
    return pair([user(ask(words()))], [assistant(say(words()))], [assistant(say(words()))], **more)


def history(words: Words, first: Turn | None = None) -> list[Turn]:
    """A question, an answer, and a question."""
    return [user(words()), first or assistant(words()), user(words())]


def as_text(case: Case, *names: str) -> Case:
    """The case with columns as JSON text."""
    case.row |= {name: json.dumps(case.row[name]) for name in names}
    return case


def full(case: Case) -> Case:
    """The case as two whole conversations."""
    case.row = {"chosen": case.prompt + case.answers[0], "rejected": case.prompt + case.answers[1]}
    return case


def sharegpt(case: Case) -> Case:
    """The case in ShareGPT's layout."""
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    turns = [[{"from": names[t["role"]], "value": t["content"]} for t in part] for part in (case.prompt, *case.answers)]
    case.row = {"conversations": turns[0], "chosen": turns[1][0], "rejected": turns[2][0]}
    return case


def openai(case: Case) -> Case:
    """The case in OpenAI's layout."""
    given = {"messages": case.prompt} | ({"tools": case.tools} if case.tools else {})
    case.row = {"input": given, "preferred_output": case.answers[0], "non_preferred_output": case.answers[1]}
    return case


def ranked(case: Case) -> Case:
    """The case as answers with scores, the worse one first."""
    case.row = {"prompt": case.prompt, "completions": case.answers[::-1], "scores": [1, 2]}
    case.answers = case.answers[::-1]
    return case


def single(case: Case) -> Case:
    """The first answer with a label."""
    case.answers = case.answers[:1]
    case.row = {"prompt": case.prompt, "completion": case.answers[0], "label": True}
    return case


def whole(case: Case) -> Case:
    """The first answer as a conversation to learn from."""
    case.answers = case.answers[:1]
    case.row = {"messages": case.prompt + case.answers[0]}
    return case


def parts(case: Case) -> Case:
    """Contents as lists of text parts."""
    case.row = json.loads(json.dumps(case.row))
    for part in (case.row["prompt"], case.row["chosen"], case.row["rejected"]):
        for turn in part:
            turn["content"] = [{"type": "text", "text": turn["content"]}]
    return case


def calling(words: Words, change: Callable[[Turn], Any] = lambda arguments: arguments, **more: Any) -> Case:
    """A call against a plain answer, where `change` is how its arguments stand in the row."""
    turn = call(words, **more)
    case = pair([user(words())], [turn], [assistant(words())], tools=[tool(words)])
    stored = json.loads(json.dumps(turn))
    function = stored["tool_calls"][0]["function"]
    function["arguments"] = change(function["arguments"])
    case.row = {**case.row, "chosen": [stored]}
    return case


def prefilled(words: Words, begun: str, say: str = "{}") -> Case:
    """Answers that go on with a turn of the prompt's."""
    prompt = [user(words()), assistant(begun.format(words()))]
    return pair(prompt, *([assistant(say.format(words()))] for _ in range(2)), ways=("continued",))


def looped(words: Words, between: list[Turn]) -> Case:
    """An answer of two turns of the assistant's with others' between them."""
    first = call(words) if between and between[0]["role"] == "tool" else assistant(words())
    return pair([user(words())], [first, *between, assistant(words())], [assistant(words())])


def results_first(words: Words, *results: Turn) -> Case:
    """Answers that begin with what a tool says to the prompt's call."""
    answers = [[found, assistant(words())] for found in results]
    return pair([user(words()), call(words)], *answers)


def thoughtful(text: str, before: str = "\n", after: str = "\n\n") -> Callable[[str], str]:
    """What is said, after thoughts in tags."""
    return lambda said: f"<think>{before}{text}\n</think>{after}{said}"


def with_nulls(case: Case) -> Case:
    """The case with a null in a call and one in a tool, as JSON may have them too."""
    row = json.loads(json.dumps(case.row))
    row["chosen"][0]["tool_calls"][0]["function"]["arguments"]["nothing"] = None
    row["tools"][0]["function"]["parameters"]["default"] = None
    return replace(case, row=row, choice=NULLS)


def rendered(words: Words, render: Render, **settings: Any) -> Case:
    """Texts that the template has rendered, cut where the texts of both answers part."""
    case = simple(words, settings=settings)
    texts = [render(case.prompt + answer) for answer in case.answers]
    asked = render(case.prompt, asking=True)
    end = min(len(os.path.commonprefix([asked, text])) for text in texts)
    case.row = {"prompt": texts[0][:end], "chosen": texts[0][end:], "rejected": texts[1][end:]}
    return case


NULLS, OBJECTS = "nulls of tools and calls are left out", "arguments are objects"
STAYS = ("sanitized",)

KINDS: dict[str, Callable[[Words, Render], Case]] = {
    "messages": lambda w, _: simple(w),
    "system": lambda w, _: pair([{"role": "system", "content": w()}, user(w())], [assistant(w())], [assistant(w())]),
    "history": lambda w, _: pair(history(w), [assistant(w())], [assistant(w())]),
    "whole conversations": lambda w, _: full(simple(w)),
    "sharegpt": lambda w, _: sharegpt(simple(w)),
    "openai": lambda w, _: openai(simple(w)),
    "ranked": lambda w, _: ranked(simple(w)),
    "unpaired": lambda w, _: single(simple(w)),
    "fine-tuning": lambda w, _: whole(simple(w)),
    "text parts": lambda w, _: parts(simple(w)),
    "JSON text": lambda w, _: as_text(simple(w), "prompt", "chosen", "rejected"),
    "JSON text, whole": lambda w, _: as_text(full(simple(w)), "chosen", "rejected"),
    "JSON text, broken": lambda w, _: broken(simple(w)),
    "spaces": lambda w, _: simple(w, lambda said: f"\n {said} \t\n", lambda asked: f" {asked}\n\n"),
    "empty answer": lambda w, _: simple(w, lambda _: " \n"),
    "think tags": lambda w, _: simple(w, thoughtful(w())),
    "think tags, tight": lambda w, _: simple(w, thoughtful(w(), "", "")),
    "think tags in history": lambda w, _: pair(
        history(w, assistant(thoughtful(w())(w()))), [assistant(w())], [assistant(w())]
    ),
    "reasoning": lambda w, _: pair(
        [user(w())], [assistant(w(), reasoning_content=w())], [assistant(w(), reasoning_content=w())]
    ),
    "call tags in text": lambda w, _: simple(w, lambda said: f'<tool_call>\n{{"name": "{said}"}}\n</tool_call>'),
    "think tags of a user": lambda w, _: simple(w, ask=lambda asked: f"{asked} <think> {w()}", ways=STAYS),
    "turn marks of a user": lambda w, render: simple(w, ask=lambda asked: f"{asked}{marks(render)}{w()}", ways=STAYS),
    "think tags of both": lambda w, _: simple(
        w, thoughtful(w()), lambda asked: f"{asked} <think> {w()}", ways=("mixed",)
    ),
    "turn marks in results": lambda w, render: pair(
        [user(w()), call(w), {**result(w), "content": f"{w()}{marks(render)}{w()}"}],
        *([assistant(w())] for _ in range(2)),
        ways=STAYS,
    ),
    "turn marks in tools": lambda w, render: pair(
        [user(w())], [assistant(w())], [assistant(w())], tools=[tool(w, f" {marks(render)} ")], ways=STAYS
    ),
    "turn marks in an answer": lambda w, render: simple(w, lambda said: f"{said}{marks(render)}{w()}", ways=STAYS),
    "calls": lambda w, _: calling(w),
    "calls with words": lambda w, _: calling(w, text=w()),
    "calls with reasoning": lambda w, _: calling(w, reasoning_content=w()),
    "calls with think tags": lambda w, _: calling(w, text=thoughtful(w())("")),
    "calls, two": lambda w, _: twice(calling(w), call(w)),
    "calls, arguments as text": lambda w, _: replace(calling(w, json.dumps), choice=OBJECTS),
    "calls, arguments broken": lambda w, _: calling(w, lambda arguments: json.dumps(arguments)[:-2]),
    "calls as text": lambda w, _: calls_as_text(calling(w)),
    "tools as text": lambda w, _: as_text(calling(w), "tools"),
    "calls, numbers": lambda w, _: calling(w, arguments={w(1, 1): 3, w(1, 1): [1.5, True]}),
    "calls in Parquet": lambda w, _: replace(calling(w), parquet=True),
    "calls with nulls": lambda w, _: with_nulls(calling(w)),
    "results in the prompt": lambda w, _: pair(
        [user(w()), call(w), result(w)], [assistant(w())], [assistant(w())], tools=[tool(w)]
    ),
    "results in an answer": lambda w, _: looped(w, [result(w)]),
    "two results in an answer": lambda w, _: looped(w, [result(w), assistant(w()), user(w())]),
    "results first": lambda w, _: results_first(w, *[result(w)] * 2),
    "results first, others": lambda w, _: results_first(w, result(w), result(w)),
    "a call before an answer": lambda w, _: pair([user(w()), call(w)], [assistant(w())], [assistant(w())]),
    "two turns in an answer": lambda w, _: looped(w, []),
    "a user in an answer": lambda w, _: looped(w, [user(w())]),
    "results scored": lambda w, _: replace(looped(w, [result(w)]), settings={"score_tool_results": True}),
    "prefill": lambda w, _: prefilled(w, "{}", " {}"),
    "prefill, no space": lambda w, _: prefilled(w, "{}: ", "{}"),
    "prefill, thinking": lambda w, _: prefilled(w, "<think>\n{}", " so\n</think>\n\n{}"),
    "prefill, thought": lambda w, _: prefilled(w, "<think>\n{}\n</think>\n\n", "{}"),
    "no thinking": lambda w, _: simple(w, kwargs={"enable_thinking": False}),
    "rendered": lambda w, render: rendered(w, render, control_tokens="tokens"),
    "rendered, as text": lambda w, render: rendered(w, render),
}


def broken(case: Case) -> Case:
    """JSON text that ends too soon."""
    case.row = {name: json.dumps(value)[:-2] for name, value in case.row.items()}
    return case


def twice(case: Case, other: Turn) -> Case:
    """The case with another call beside the first."""
    case.answers[0][0]["tool_calls"] += other["tool_calls"]
    case.row["chosen"] = case.answers[0]
    return case


def calls_as_text(case: Case) -> Case:
    """The calls of the better answer as JSON text."""
    case.row["chosen"][0]["tool_calls"] = json.dumps(case.row["chosen"][0]["tool_calls"])
    return case


def marks(render: Render) -> str:
    """The first control token that a template writes after a user's words."""
    text = render([user("QQ"), assistant("ZZ")])
    found = re.search(r"<[^<>]+>", text[text.index("QQ") :])
    return found[0] if found else ""
