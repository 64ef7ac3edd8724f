"""Settings of the data and of the batches made from it."""

import re
from typing import Any, Literal, get_args

from pydantic import Field, field_validator, model_validator

from dpo_jax.errors import short
from dpo_jax.settings import Section

Layout = Literal[
    "auto",
    "pair",
    "implicit",
    "sharegpt",
    "openai",
    "tokenized",
    "ranked",
    "scored",
    "tree",
    "unpaired",
    "completion",
    "messages",
]
"""What `data.layout` takes."""
LAYOUTS = get_args(Layout)[1:]
"""Names of the row layouts (see layouts.py)."""

SET_NAME = "[A-Za-z0-9_]{1,40}"
"""What a set of `data.eval` may be called."""


def _plain(value: object) -> Any:
    """A value of a block as JSON has it: the lists that YAML is read as are tuples."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


class DataSettings(Section):
    """Which preference pairs are read, and how they become tokens."""

    train: str | tuple[str, ...] = Field(
        description="file, folder (folder:split if it has several) or hub data set (name or name:split) of preferences"
    )
    eval: str | tuple[str, ...] | dict[str, str | tuple[str, ...]] | None = Field(
        default=None,
        description="held-out preferences, in any of the same forms; or several such sets by name, as in "
        "{helpful: a.jsonl, harmless: [b.jsonl, c.jsonl]}, each measured by itself, and all together",
    )
    eval_fraction: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="hold out about this share of the prompts of data.train, with all their answers, in place of "
        "data.eval: which ones follows from the seed and the prompt",
    )
    layout: Layout = Field(
        default="auto", description="layout of the rows; auto detects it for each file and reports it"
    )
    columns: dict[str, str | tuple[str, ...]] | None = Field(
        default=None,
        description="columns of the files that go by other names, as {prompt: question, chosen: good, rejected: bad}; "
        "texts of several columns, as in {prompt: [instruction, input]}, are joined by a line break, and answers of "
        "several are a list; {completions: answers.text, ranks: answers.rank} reads fields of objects",
    )
    as_chat: bool = Field(
        default=False,
        description="make turns for the model's chat template of text rows: of dialogues of Human: and Assistant:, "
        "and of a plain prompt and its answers",
    )
    max_length: int = Field(default=1024, gt=1, description="most tokens of a prompt and one completion together")
    truncation: Literal["keep_completion", "keep_start", "keep_end"] = Field(
        default="keep_completion",
        description="what a too long pair loses: the oldest of the prompt, but for BOS and the system turn "
        "(keep_completion), or TRL's keep_start and keep_end",
    )
    ending: Literal["terminator", "template"] | None = Field(
        default=None,
        description="what of a chat answer's end is kept: the token that ends the turn (the default), or all that the "
        "template writes there (the default with TRL's truncations, and for reward models, whose score is read at the "
        "last token)",
    )
    template: str | None = Field(
        default=None, description="chat template file (Jinja) to use instead of the tokenizer's own"
    )
    chat_template_kwargs: dict[str, Any] | None = Field(
        default=None,
        description="arguments for the chat template, as {enable_thinking: false}; a row's own go before them",
    )
    control_tokens: Literal["text", "tokens"] = Field(
        default="text",
        description="what control tokens inside row text become: plain text (but for those that mark no turn, such as "
        "<think>, where the assistant says them), or real control tokens, as texts need that were rendered already",
    )
    score_tool_results: bool = Field(
        default=False,
        description="score what tools and users say inside an answer of several turns, as TRL does; by default only "
        "the assistant's own tokens are scored, and the others are read",
    )
    max_bad_fraction: float = Field(
        default=0.01, ge=0, le=1, description="stop if more than this share of rows is unusable"
    )
    max_characters: int | None = Field(
        default=None,
        gt=0,
        description="most characters of a prompt, and of a completion, that are tokenised; the rest of a longer one is "
        "cut by data.truncation before that (default 64 x max_length)",
    )
    shuffle: bool = Field(
        default=True, description="a new order in each epoch, from the seed; false keeps the file's order"
    )
    first: int | None = Field(default=None, gt=0, description="use only the first this many rows of data.train")
    workers: int | None = Field(
        default=None,
        ge=0,
        description="processes that tokenise where there are many rows (default: one for each core, at most 16); 0 and "
        "1 tokenise in the run's own process",
    )
    stream: bool = Field(
        default=False,
        description="read Parquet files of a hub data set where they lie, and keep of them the tokenised rows alone: "
        "each process fetches the row groups that it tokenises",
    )
    cache: str | None = Field(default=None, description="folder for tokenised data and reference log-probabilities")

    @field_validator("chat_template_kwargs")
    @classmethod
    def _as_json(cls, value: object) -> Any:
        return _plain(value)

    @property
    def eval_sets(self) -> dict[str, str | tuple[str, ...]]:
        """What `eval` names, by the name of the set; of a single set that is empty."""
        return self.eval if isinstance(self.eval, dict) else {} if self.eval is None else {"": self.eval}

    @property
    def holds_out(self) -> bool:
        """Whether there are held-out preferences."""
        return self.eval is not None or self.eval_fraction is not None

    @field_validator("eval")
    @classmethod
    def _sets_have_names(cls, value: object) -> Any:
        wrong = [name for name in value if not re.fullmatch(SET_NAME, name)] if isinstance(value, dict) else []
        if wrong:
            raise ValueError(
                f"data.eval: {short(wrong[0])!r} cannot name a set, as it is to stand in names of metrics; give "
                "letters, digits and underscores"
            )
        return value

    @model_validator(mode="after")
    def _columns_are_known(self) -> "DataSettings":
        from dpo_jax.data.columns import problems_of  # what reads rows is not for --help

        if problems := problems_of(self.columns or {}):
            raise ValueError("\n".join(f"data.columns: {problem}" for problem in problems))
        return self


class BatchSettings(Section):
    """What one optimizer step sees."""

    pairs: int = Field(default=64, gt=0, description="pairs per optimizer step, exactly, on all devices together")
    micro_tokens: int | None = Field(
        default=None,
        gt=0,
        description="token slots per device and micro-batch (default: chosen from the data's lengths)",
    )
    share_prompts: bool = Field(default=True, description="compute a prompt once for all its completions")
