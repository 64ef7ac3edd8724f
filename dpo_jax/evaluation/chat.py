"""Answers to prompts, shown and written down: one after the other, side by side, or as a conversation."""

import contextlib
import json
import sys
import time
import unicodedata
from collections.abc import Sequence
from typing import Any, NamedTuple, TextIO

from dpo_jax.data.templates import Codec
from dpo_jax.errors import UserError
from dpo_jax.evaluation.generate import Answer, Decoding, generate, stream
from dpo_jax.evaluation.likelihood import answer_logprobs
from dpo_jax.evaluation.winrate import Asked, Prompt, prompt_tokens, text_of
from dpo_jax.model.decoder import Model

HELP = "Type a message. /reset forgets the conversation, /quit (or Ctrl-D) leaves, Ctrl-C stops an answer."
JOINERS = "\u200c\u200d"
"""Invisible characters that hold letters and emoji together, and move nothing on a screen."""


class Speaker(NamedTuple):
    """A model that answers, under the name that it is shown with."""

    name: str
    model: Model


class Session(NamedTuple):
    """All that prompts are answered with; with two speakers, the second is what the first is compared with."""

    speakers: tuple[Speaker, ...]
    coder: Codec
    decoding: Decoding
    seed: int
    chat: bool
    """Whether a prompt that is a text becomes a message of a user, put through the chat template."""
    system: str | None


# ---------------------------------------------------------------------------------------------- given prompts


def answer_all(session: Session, asked: Sequence[Asked], output: TextIO | None, as_json: bool) -> None:
    """Answer each prompt and show it; with `output`, each answer is also a row of that file."""
    began = time.perf_counter()
    prompts = [_prompt_of(session, item.prompt, item.where) for item in asked]
    rows = _rows(session, prompts, [item.where for item in asked])
    spent = time.perf_counter() - began
    for answers in rows:
        _write(answers, output)
        if as_json:
            print("\n".join(map(_line, answers)))
        else:
            _show_prompt(answers[0]["prompt"])
            _show(answers)
    count = sum(row["tokens"] for answers in rows for row in answers)
    print(f"{count} tokens in {spent:.1f} s ({count / spent:.1f} tokens/s, compiling included)", file=sys.stderr)


def _prompt_of(session: Session, prompt: Prompt, where: str) -> Prompt:
    """The prompt as the model is asked it: a conversation, or a text."""
    if isinstance(prompt, str):
        if not session.chat:
            return prompt
        prompt = [{"role": "user", "content": prompt}]
    elif not session.chat:
        raise UserError(f"{where}: messages need a chat template; leave out --raw, or give texts")
    begun = prompt[0]["role"] in ("system", "developer")
    return prompt if session.system is None or begun else [{"role": "system", "content": session.system}, *prompt]


def _rows(session: Session, prompts: Sequence[Any], places: Sequence[str]) -> list[list[dict[str, Any]]]:
    """For each prompt a row for each speaker's answer; if there are two speakers, with both log-probabilities."""
    ids = [prompt_tokens(prompt, session.coder, where) for prompt, where in zip(prompts, places, strict=True)]
    columns = []
    for speaker in session.speakers:
        spec, params = speaker.model.spec, speaker.model.params
        given = generate(spec, params, ids, session.decoding, seed=session.seed)
        rows = [_row(session, speaker.name, prompt, one) for prompt, one in zip(prompts, given, strict=True)]
        columns.append([{**row, **score} for row, score in zip(rows, _scores(session, ids, given), strict=True)])
    return [list(row) for row in zip(*columns, strict=True)]


def _row(session: Session, name: str, prompt: object, given: Answer) -> dict[str, Any]:
    text = text_of(session.coder.tokenizer, given.tokens)
    return {"prompt": prompt, "model": name, "answer": text, "finished": given.finished, "tokens": len(given.written)}


def _scores(session: Session, ids: Sequence[list[int]], answers: Sequence[Answer]) -> list[dict[str, float]]:
    """Of each answer with its end: log-probability under the first model, under the second, and the difference."""
    if len(session.speakers) == 1:
        return [{} for _ in answers]
    written = [answer.written for answer in answers]
    policy, reference = (answer_logprobs(s.model.spec, s.model.params, ids, written) for s in session.speakers)
    pairs = zip(policy, reference, strict=True)
    return [{"logp": p, "reference_logp": r, "log_ratio": p - r} for p, r in pairs]


def _line(row: dict[str, Any]) -> str:
    """A row as JSON: readable where every character can be shown, and otherwise in ASCII."""
    text = json.dumps(row, ensure_ascii=False)
    return text if text.isprintable() else json.dumps(row)


def _write(rows: Sequence[dict[str, Any]], output: TextIO | None) -> None:
    if output is not None:
        output.write("".join(f"{_line(row)}\n" for row in rows))
        output.flush()


# ---------------------------------------------------------------------------------------------- showing


def visible(text: str) -> str:
    """A model's text as a terminal may show it: in its lines, with whatever could steer the terminal written out."""
    lines = (line.expandtabs(4) for line in text.split("\n"))
    return "\n".join("".join(c if _harmless(c) else repr(c)[1:-1] for c in line) for line in lines)


def _harmless(char: str) -> bool:
    return char in JOINERS or unicodedata.category(char) not in ("Cc", "Cf", "Cs", "Zl", "Zp")


def _show_prompt(prompt: Prompt) -> None:
    last = prompt if isinstance(prompt, str) else prompt[-1].get("content", "")
    print("\n".join(f"> {line}" for line in visible(last).split("\n")))


def _show(rows: Sequence[dict[str, Any]]) -> None:
    """Answers to a prompt: side by side on a terminal, and one after the other elsewhere."""
    if len(rows) > 1 and sys.stdout.isatty():
        _columns(rows)
    else:
        for row in rows:
            heading = f"[answer of {visible(row['model'])}: {_numbers(row, rows)}]\n" if len(rows) > 1 else ""
            print(heading + visible(row["answer"]) + _cut(row))
    print()


def _columns(rows: Sequence[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(expand=True, pad_edge=False)
    for row in rows:
        table.add_column(Text(visible(row["model"])), ratio=1, overflow="fold")
    table.add_row(*(Text(visible(row["answer"]) + _cut(row)) for row in rows))
    table.add_section()
    table.add_row(*(Text(_numbers(row, rows), "dim") for row in rows))
    Console(highlight=False, markup=False, emoji=False).print(table)


def _numbers(row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    """The log-probabilities (nats) of one of two models' answers, under both."""
    first, second = (visible(one["model"]) for one in rows)
    scores = f"logp {row['logp']:.2f} under {first}, {row['reference_logp']:.2f} under {second}"
    return f"{scores}, log-ratio {row['log_ratio']:+.2f}, {row['tokens']} tokens"


def _cut(row: dict[str, Any]) -> str:
    return "" if row["finished"] else f" [cut off after {row['tokens']} tokens]"


# ---------------------------------------------------------------------------------------------- conversation


def converse(session: Session, output: TextIO | None) -> None:
    """A line from the person, an answer, and so on. With two speakers, both go on from what the first one said."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (gives `input` its editing keys)
    print(HELP if session.chat else "Type a text to go on with; every line stands alone. /quit (or Ctrl-D) leaves.")
    history: list[dict[str, Any]] = []
    turn = 0
    while (line := _input()) is not None:
        if line.strip() == "/quit":
            return
        if line.strip() == "/reset":
            history = []
            print("the conversation is forgotten")
        elif line.strip():
            try:
                prompt = _prompt_of(
                    session, [*history, {"role": "user", "content": line}] if session.chat else line, ""
                )
                rows = _turn(session._replace(seed=(session.seed + turn) % 2**32), prompt)
            except UserError as error:
                print(f"error: {visible(str(error))}")
                continue
            _write(rows, output)
            turn += 1
            if session.chat:
                history += [{"role": "user", "content": line}, {"role": "assistant", "content": rows[0]["answer"]}]


def _input() -> str | None:
    try:
        return input("> ").encode("utf-8", "replace").decode().replace("\0", "")
    except EOFError:
        print()
        return None


def _turn(session: Session, prompt: Prompt) -> list[dict[str, Any]]:
    if len(session.speakers) == 1:
        return [_spoken(session, prompt)]
    (rows,) = _rows(session, [prompt], [""])
    _show(rows)
    return rows


def _spoken(session: Session, prompt: Prompt) -> dict[str, Any]:
    """One answer, shown while it is written."""
    ids = prompt_tokens(prompt, session.coder)
    ((name, model),) = session.speakers
    row, shown, note = _row(session, name, prompt, Answer([], None)), 0, ""
    try:
        for answer in stream(model.spec, model.params, ids, session.decoding, seed=session.seed):
            row = _row(session, name, prompt, answer)
            # a character that is only half there is decoded as this; wait for its other half
            ready = len(row["answer"].rstrip("\ufffd"))
            print(visible(row["answer"][shown:ready]), end="", flush=True)
            shown = max(shown, ready)
    except KeyboardInterrupt:
        note = " [stopped]"
    print(visible(row["answer"][shown:]) + (note or _cut(row)) + "\n")
    return row
