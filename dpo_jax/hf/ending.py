"""Whether a model stops where it was trained to: its folder must list the token that ends an assistant's turn.

Training teaches a model to end an answer with what the chat template ends a turn with, or with EOS where there is none.
Programs that generate text stop at `eos_token_id` of `generation_config.json` (of `config.json` where that says
nothing), and go on past any other token.
"""

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from dpo_jax.data.templates import codec
from dpo_jax.data.tokenizer import Tokenizer
from dpo_jax.errors import UserError, printable
from dpo_jax.hf.beside import GENERATION
from dpo_jax.hf.tensors import read_json
from dpo_jax.hf.tokenizer import generation_settings


class Ending(NamedTuple):
    """What ends an answer in training (`token` of number `id`), and what a folder lists to stop at."""

    id: int
    token: str
    listed: tuple[int, ...]

    @property
    def is_listed(self) -> bool:
        """Whether generation stops there."""
        return self.id in self.listed

    def line(self, aligned: bool) -> str | None:
        """What a user must know, in words; None where the folder lists the token."""
        if self.is_listed:
            return None
        lists = f"lists {', '.join(map(str, self.listed))}" if self.listed else "lists no token"
        said = f"answers end with token {self.id} ({printable(self.token)}), and the model's folder {lists} to stop at"
        if aligned:
            return f"{said}; the exported {GENERATION} lists it too (export.align_eos)"
        return f"{said}: programs may not stop there; export.align_eos=true adds it to the exported {GENERATION}"


def ending_of(folder: Path, tokenizer: Tokenizer, template: str | None = None) -> Ending | None:
    """How answers end that a run trains on this model; None where neither a template nor an EOS token ends them.

    Raises:
      UserError: a file of the folder has a value that is not of its kind.
    """
    found = codec(tokenizer, template=template, control_tokens="text", ending="terminator")
    end = found.turn.terminator if found.turn.terminator is not None else found.eos[1] if found.eos else None
    if end is None:
        return None
    return Ending(end, tokenizer.decode([end]), generation_settings(folder).eos)


def aligned(folder: Path, ending: Ending | None) -> dict[str, str]:
    """The folder's `generation_config.json` with the ending among its tokens to stop at, by name; empty if it is there.

    Raises:
      UserError: the file is not as it must be.
    """
    if ending is None or ending.is_listed:
        return {}
    table: dict[str, Any] = read_json(folder, GENERATION) if os.path.lexists(folder / GENERATION) else {}
    table |= {"eos_token_id": [*ending.listed, ending.id]}
    return {GENERATION: json.dumps(table, indent=2, ensure_ascii=False) + "\n"}


def check_setting(align: bool, scalar_head: bool) -> None:
    """Refuses `export.align_eos` where it would do nothing."""
    if align and scalar_head:
        raise UserError("export.align_eos: a reward model generates nothing; leave it out")
