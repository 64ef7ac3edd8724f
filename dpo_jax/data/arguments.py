"""Arguments of a run for its chat template (`data.chat_template_kwargs`), and the one day that the template writes."""

import copy
import datetime
import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from dpo_jax.data.report import clean
from dpo_jax.data.templates import reserved_arguments, template_source
from dpo_jax.data.tokenizer import Tokenizer
from dpo_jax.errors import UserError, nearest


def check_arguments(given: Mapping[str, Any], tokenizer: Tokenizer, template: str | None) -> None:
    """Whether a run may give these arguments to its chat template: `template`, or the tokenizer's own.

    Raises:
      UserError: it uses none of that name, or that name is not for a run to set.
    """
    source, reserved = template_source(tokenizer, template), reserved_arguments(tokenizer)
    for name in given:
        what, near = clean(name, 80), None
        if name in reserved:
            problem = f"{what!r} is not for a run to set"
        elif not source:
            problem = "the tokenizer has no chat template"
        elif re.search(rf"\b{re.escape(name)}\b", source):
            continue
        else:
            problem = f"the chat template uses no {what!r}"
            near = nearest(name, set(re.findall(r"\b[a-z]\w+\b", source)), 0.8)
        hint = f"did you mean {clean(near, 80)}?" if near else "leave it out"
        raise UserError(f"data.chat_template_kwargs: {problem}; {hint}")


# ------------------------------------------------------------------------------------------------ the day


def today() -> str:
    """The day, as YYYY-MM-DD."""
    return datetime.date.today().isoformat()


class Dated(NamedTuple):
    """A tokenizer and a chat template in its place, if any, that write one `date` whenever they are used.

    The date (YYYY-MM-DD) is empty where neither may write one.
    """

    tokenizer: Tokenizer
    template: str | None
    date: str


def dated(tokenizer: Tokenizer, template: str | None = None, date: str | None = None) -> Dated:
    """The same, with the date (None is today) for the clock that templates ask with `strftime_now`."""
    if "strftime_now" not in (template_source(tokenizer, template) or ""):
        return Dated(tokenizer, template, "")
    date, own = date or today(), tokenizer.chat_template
    if template is not None:
        return Dated(tokenizer, _clock(date) + template, date)
    pinned = copy.copy(tokenizer)
    if isinstance(own, Mapping):
        pinned.chat_template = {name: _clock(date) + text for name, text in own.items()}
    else:
        pinned.chat_template = f"{_clock(date)}{own}"
    return Dated(pinned, None, date)


DIRECTIVES = "aAbBcdfFDeGghHIjklmMnpPrRsStTuUVwWxXyYzZC"
"""Letters that `strftime` knows behind a percent sign."""


def _clock(date: str) -> str:
    """A definition of `strftime_now` to stand before a template, which knows nothing but the beginning of one day.

    Its last line break is taken off again (`trim_blocks`), so that the template begins as it did.
    """
    day = datetime.datetime.fromisoformat(date)
    forms = [f"%{flag}{letter}" for letter in DIRECTIVES for flag in ("", "-")]
    texts = {form: day.strftime(form) for form in forms}
    steps = "".join(f" | replace({json.dumps(form)}, {json.dumps(text)})" for form, text in texts.items())
    return "{%- macro strftime_now(format) -%}{{ format" + steps + " }}{%- endmacro %}\n"
