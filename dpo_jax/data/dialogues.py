"""Turns from texts (`data.as_chat`): dialogues as hh-rlhf and HelpSteer write them, plain prompts and answers.

"\\n\\nHuman: Hi?\\n\\nAssistant:"                            / " Yo"  ->   user "Hi?" / assistant "Yo"
"Hi?\\n<extra_id_1>Assistant\\nYo\\n<extra_id_1>User\\nSo?" / "Well" ->   user "Hi?", assistant "Yo", user "So?" / ...
"Hi?"                                                     / " Yo"  ->   user "Hi?" / assistant "Yo"
"""

import re

from dpo_jax.data.answers import MARKER, Answers
from dpo_jax.data.messages import BadRow, Messages, Part

_SPEAKERS = {"Human": "user", "Assistant": "assistant"}
_TAGS = {"User": "Human", "Assistant": "Assistant"}
_TAG = re.compile(r"\s*<extra_id_1>(User|Assistant)\n")
_TURN = re.compile(r"(?:\A|\n\n)[ \t]*(Human|Assistant):")


def in_turns(answers: Answers, *, splits: bool) -> Answers:
    """Texts as turns; what are turns already stays. `splits`: where the prompt ends was found in the texts themselves.

    Raises:
      BadRow: they are token ids, or texts of which nobody says where the prompt ends.
    """
    if not isinstance(answers.prompt, str):
        if answers.completions and all(isinstance(token, int) for token in answers.completions[0]):
            raise BadRow("wrong type", "token ids cannot be made into turns; leave data.as_chat out")
        return answers
    turns = _turns(answers.prompt)
    if splits and turns is None:
        raise BadRow(
            "wrong type", "data.as_chat: no dialogue of Human: and Assistant:, so where the prompt ends is not known"
        )
    if turns is None:
        return _with(answers, _tagged(answers.prompt), [_plain(text) for text in answers.completions])
    if turns[-1] == _message("Assistant", ""):  # opened for the answer
        turns = turns[:-1]
    return _with(answers, turns, [_answer(text) for text in answers.completions])


def _with(answers: Answers, prompt: Messages, completions: list[Messages]) -> Answers:
    return answers._replace(prompt=prompt, completions=tuple(completions))


def _message(speaker: str, text: str) -> dict[str, str]:
    return {"role": _SPEAKERS[speaker], "content": text}


def _turns(text: str) -> Messages | None:
    """The turns of a dialogue; None of a text that does not begin as one."""
    parts = _TURN.split(text.lstrip())
    if parts[0] or len(parts) < 3:
        return None
    return [_message(speaker, said.strip()) for speaker, said in zip(parts[1::2], parts[2::2], strict=True)]


def _tagged(text: str) -> Messages:
    """The turns of a prompt that tags all but its first one; all of it, where it has no tags."""
    first, *rest = _TAG.split(text)
    later = [_message(_TAGS[speaker], said) for speaker, said in zip(rest[::2], rest[1::2], strict=True)]
    return [_message("Human", first), *later]


def _plain(text: Part) -> Messages:
    return [_message("Assistant", str(text).removeprefix(" "))]


def _answer(text: Part) -> Messages:
    """The turns of an answer within a dialogue: mostly one, with or without its marker."""
    said = str(text)
    marked = said.lstrip().startswith(MARKER.lstrip())
    return _turns(said if marked else f"{MARKER}{said}") or []
