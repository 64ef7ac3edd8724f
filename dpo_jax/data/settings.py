"""Settings of the data and of the batches made from it."""

from typing import Literal

from pydantic import Field

from dpo_jax.settings import Section

LAYOUTS = ("pair", "implicit", "sharegpt", "openai", "tokenized", "ranked", "unpaired", "completion", "messages")
"""Names of the row layouts, as `data.layout` takes them (see records.py)."""


class DataSettings(Section):
    """Which preference pairs are read, and how they become tokens."""

    train: str | tuple[str, ...] = Field(description="file, folder or hub data set (name or name:split) of preferences")
    eval: str | tuple[str, ...] | None = Field(
        default=None, description="held-out preferences, in any of the same forms"
    )
    layout: Literal[
        "auto", "pair", "implicit", "sharegpt", "openai", "tokenized", "ranked", "unpaired", "completion", "messages"
    ] = Field(default="auto", description="layout of the rows; auto detects it for each file and reports it")
    max_length: int = Field(default=1024, gt=1, description="most tokens of a prompt and one completion together")
    truncation: Literal["keep_completion", "keep_start", "keep_end"] = Field(
        default="keep_completion",
        description="what a too long pair loses: the prompt's head (keep_completion), or TRL's keep_start and keep_end",
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
        default=None, gt=0, description="longest text of a row before it is tokenised (default 64 x max_length)"
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
    cache: str | None = Field(default=None, description="folder for tokenised data and reference log-probabilities")


class BatchSettings(Section):
    """What one optimizer step sees."""

    pairs: int = Field(default=64, gt=0, description="pairs per optimizer step, exactly, on all devices together")
    micro_tokens: int | None = Field(
        default=None,
        gt=0,
        description="token slots per device and micro-batch (default: chosen from the data's lengths)",
    )
    share_prompts: bool = Field(default=True, description="compute a prompt once for all its completions")
