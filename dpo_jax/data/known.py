"""Public data sets: a table with one row for each shape of them that no layout reads as it is.

A row says how the columns of a set become those of a layout (see columns.py), so that `data.train=Intel/orca_dpo_pairs`
needs no `data.columns`, nor does a copy of the set by any name: a set is known by columns that no others have. What a
run gives itself goes before it. Sets whose columns are those of a layout already are here for their split alone.
"""

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dpo_jax.data.columns import Columns, missing, replaced


@dataclass(frozen=True)
class KnownSet:
    """How a data set is read.

    Attributes:
      names: on the Hub; `*` stands for anything.
      marks: columns by which it is known; none: it is read as its columns say.
      layout: one of layouts.LAYOUTS; None: as its columns say.
      columns: the mapping.
      without: rows with one of these values in a column are left out.
      split: the one that is read where none is given.
      folders: what a source may name like a configuration, and is a folder on the Hub.
    """

    names: tuple[str, ...]
    marks: tuple[str, ...] = ()
    layout: str | None = None
    columns: Columns = field(default_factory=dict)
    without: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    split: str = "train"
    folders: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """What it is called in reports."""
        return self.names[0]

    def fits(self, row: Mapping[str, Any]) -> bool:
        """Whether the row has the set's columns, and none of its own under a name that the mapping gives."""
        marked = all(name in row for name in self.marks)
        return marked and not missing(row, self.columns) and not replaced(row, self.columns)


_HELPSTEER = ("prompt", "response", "helpfulness", "correctness", "coherence")
_HH = ("helpful-base", "helpful-online", "helpful-rejection-sampled", "harmless-base")

KNOWN_SETS = (
    # chosen and rejected, which a layout reads as they are
    KnownSet(("HuggingFaceH4/ultrafeedback_binarized", "HuggingFaceH4/orca_dpo_pairs"), split="train_prefs"),
    KnownSet(("allenai/ultrafeedback_binarized_cleaned*",), split="train_prefs"),
    KnownSet(("Anthropic/hh-rlhf",), folders=_HH),
    # chosen and rejected under other names, or a prompt under another
    KnownSet(
        ("argilla/distilabel-intel-orca-dpo-pairs",),
        ("system", "input", "chosen", "rejected", "status"),
        "pair",
        {"prompt": "input"},
        without={"status": ("tie",)},
    ),
    KnownSet(("Intel/orca_dpo_pairs",), ("system", "question", "chosen", "rejected"), "pair", {"prompt": "question"}),
    KnownSet(
        ("argilla/distilabel-math-preference-dpo", "argilla/ultrafeedback-binarized-preferences"),
        ("instruction", "chosen_response", "rejected_response"),
        "pair",
        {"prompt": "instruction", "chosen": "chosen_response", "rejected": "rejected_response"},
    ),
    KnownSet(
        ("lvwerra/stack-exchange-paired",),
        ("question", "response_j", "response_k"),
        "pair",
        {"prompt": "question", "chosen": "response_j", "rejected": "response_k"},
    ),
    # two answers, and which is better
    KnownSet(
        ("nvidia/HelpSteer3",),
        ("context", "response1", "response2", "overall_preference"),
        "ranked",
        {"prompt": "context", "completions": ("response1", "response2"), "strength": "overall_preference"},
    ),
    KnownSet(
        ("nvidia/HelpSteer2",),
        ("prompt", "response_1", "response_2", "preference_strength"),
        "ranked",
        {"completions": ("response_1", "response_2"), "strength": "preference_strength"},
        folders=("preference",),
    ),
    KnownSet(
        ("PKU-Alignment/PKU-SafeRLHF*",),
        ("prompt", "response_0", "response_1", "better_response_id"),
        "ranked",
        {"completions": ("response_0", "response_1"), "best": "better_response_id"},
    ),
    KnownSet(
        ("stanfordnlp/SHP*",),
        ("history", "human_ref_A", "human_ref_B", "score_A", "score_B"),
        "ranked",
        {"prompt": "history", "completions": ("human_ref_A", "human_ref_B"), "scores": ("score_A", "score_B")},
    ),
    # several answers with ranks or scores
    KnownSet(
        ("berkeley-nest/Nectar",),
        ("prompt", "answers", "good_natured"),
        "ranked",
        {"completions": "answers.answer", "ranks": "answers.rank"},
    ),
    KnownSet(
        ("openbmb/UltraFeedback",),
        ("instruction", "models", "completions"),
        "ranked",
        {"prompt": "instruction", "completions": "completions.response", "scores": "completions.overall_score"},
    ),
    # several rows of one prompt, or of one tree
    KnownSet(
        ("nvidia/HelpSteer2", "nvidia/HelpSteer"),
        _HELPSTEER,
        "scored",
        {"completion": "response", "score": "helpfulness"},
    ),
    KnownSet(("OpenAssistant/oasst1", "OpenAssistant/oasst2"), ("message_id", "parent_id", "rank"), "tree"),
    KnownSet(("OpenAssistant/oasst*.trees",), ("message_tree_id", "tree_state", "prompt"), "tree"),
)
"""All of them; no row fits the columns of two that are read differently."""


def recognised(row: Mapping[str, Any]) -> KnownSet | None:
    """The data set that a row is of, by its columns."""
    return next((known for known in KNOWN_SETS if known.marks and known.fits(row)), None)


def named(name: str) -> list[KnownSet]:
    """The data sets that go by this name on the Hub."""
    lower = name.lower()
    return [known for known in KNOWN_SETS if any(fnmatch.fnmatch(lower, given.lower()) for given in known.names)]


def split_of(name: str, folder: str | None) -> tuple[str, str | None]:
    """The split of a data set of the Hub to read where none is given, and the folder that `folder` is, if it is one."""
    found = named(name)
    folders = {folder for known in found for folder in known.folders}
    return next((known.split for known in found), "train"), folder if folder in folders else None
