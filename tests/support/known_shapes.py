"""Rows in the shapes of public data sets, made here: the same few questions, and answers of which the first is best."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tests.support.tiny_rows import assistant, user

Pair = tuple[Any, str, str]
"""Prompt (text, or messages as (role, text)), better answer, worse answer."""


def question(n: int) -> str:
    return f"What is {n} and {n}?"


def answer(n: int, k: int) -> str:
    """The k-th best answer to a question."""
    return f"{2 * n + k}, it is."


def said(n: int, k: int) -> list[dict[str, str]]:
    return [user(question(n)), assistant(answer(n, k))]


def dialogue(n: int, k: int) -> str:
    return f"\n\nHuman: {question(n)}\n\nAssistant: {answer(n, k)}"


class Shape(NamedTuple):
    """A data set.

    Attributes:
      name: on the Hub, as `data.train` names it.
      row: the n-th row, or rows.
      pairs: what the n-th is to be read as; KTO's are (prompt, completion, label).
      near: names that a similar data set might have in place of its own; a field of a list of objects is COLUMN.FIELD.
      called: what is asked of the Hub where it is not (name, None, "train", None).
      unranked: rows of three that prefer nothing, by kind.
    """

    name: str
    row: Callable[[int], Any]
    pairs: Callable[[int], list[Pair]]
    near: tuple[Mapping[str, str], ...]
    called: tuple[str, str | None, str, str | None] | None = None
    unranked: Mapping[str, int] = {}
    joined: int = 0

    def rows(self) -> list[dict[str, Any]]:
        made = [self.row(n) for n in (1, 2, 3)]
        return [row for one in made for row in (one if isinstance(one, list) else [one])]

    def expected(self) -> list[Pair]:
        return [pair for n in (1, 2, 3) for pair in self.pairs(n)]

    def like(self, names: Mapping[str, str]) -> list[dict[str, Any]]:
        """The rows with other names for some columns."""
        return [_renamed(row, names) for row in self.rows()]


def _renamed(row: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    def inside(column: str, value: Any) -> Any:
        fields = {path.split(".")[1]: new for path, new in names.items() if path.startswith(column + ".")}
        return [{fields.get(k, k): v for k, v in item.items()} for item in value] if fields else value

    return {names.get(column, column): inside(column, value) for column, value in row.items()}


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def chat_pair(n: int) -> list[Pair]:
    return [((("user", question(n)),), answer(n, 0), answer(n, 1))]


def text_pair(n: int) -> list[Pair]:
    return [(question(n), answer(n, 0), answer(n, 1))]


def system_pair(n: int) -> list[Pair]:
    return [((("system", "Be brief."), ("user", question(n))), answer(n, 0), answer(n, 1))]


def of(count: int, prompt: Callable[[int], Any]) -> Callable[[int], list[Pair]]:
    """All pairs of so many answers."""
    return lambda n: [(prompt(n), answer(n, i), answer(n, j)) for i in range(count) for j in range(i + 1, count)]


def asked(n: int) -> Any:
    return (("user", question(n)),)


CHOSEN = (
    {"chosen": "chosen_response"},
    {"rejected": "rejected_answer"},
    {"chosen": "accepted", "rejected": "refused"},
)
"""Near misses of rows whose answers are chosen and rejected."""
SINGLE = ({"completion": "response"}, {"completion": "answer", "prompt": "instruction"}, {"label": "desirable"})

BINARIZED = {"score_chosen": 8.5, "score_rejected": 4.0}


def both(n: int) -> dict[str, Any]:
    return {"chosen": said(n, 0), "rejected": said(n, 1)}


def _h4(n: int) -> dict[str, Any]:
    return {"prompt": question(n), "prompt_id": f"{n:064x}", **both(n), "messages": said(n, 0), **BINARIZED}


def _capybara(n: int) -> dict[str, Any]:
    before = [user("Can you add?"), assistant("I can.")]
    return {
        "source": "Dove",
        "conversation": [{"input": "Can you add?", "output": "I can."}],
        "original_response": answer(n, 0),
        "generation_prompt": ["Add."],
        "raw_generation_responses": [answer(n, 1)],
        "new_generations": [answer(n, 1)],
        "prompt": question(n),
        "chosen": before + said(n, 0),
        "rejected": before + said(n, 1),
        "rating_chosen": 5,
        "rating_rejected": 3,
        "chosen_model": "a",
        "rejected_model": "b",
    }


def _capybara_pair(n: int) -> list[Pair]:
    asked = (("user", "Can you add?"), ("assistant", "I can."), ("user", question(n)))
    return [(asked, answer(n, 0), answer(n, 1))]


def _argilla_orca(n: int) -> dict[str, Any]:
    return {
        "system": "Be brief.",
        "input": question(n),
        "chosen": answer(n, 0),
        "rejected": answer(n, 1),
        "generations": [answer(n, 0), answer(n, 1)],
        "order": ["chosen", "rejected"],
        "labelling_model": "a",
        "labelling_prompt": [{"content": "Rate.", "role": "system"}],
        "raw_labelling_response": "9 7",
        "rating": [9.0, 7.0] if n != 2 else [8.0, 8.0],
        "rationale": "Shorter.",
        "status": "unchanged" if n != 2 else "tie",
        "original_chosen": answer(n, 0),
        "original_rejected": answer(n, 1),
        "chosen_score": 9.0,
        "in_gsm8k_train": False,
    }


def _helpsteer2(n: int) -> list[dict[str, Any]]:
    """Two rows for each question; to the third, both are as helpful."""
    scores = (1, 3) if n != 3 else (2, 2)
    others = {"coherence": 4, "complexity": 1, "verbosity": 2}
    return [
        {"prompt": question(n), "response": answer(n, k), "helpfulness": score, "correctness": 4 - score, **others}
        for k, score in zip((1, 0), scores, strict=True)
    ]


def _helpsteer3(n: int) -> dict[str, Any]:
    strength = {1: -3, 2: 1, 3: 0}[n]
    first, second = (0, 1) if strength < 0 else (1, 0)
    return {
        "domain": "general",
        "language": "english",
        "context": [user(question(n))],
        "response1": answer(n, first),
        "response2": answer(n, second),
        "overall_preference": strength,
        "individual_preference": [{"score": strength, "reasoning": "Nice.", "feedback1": "a", "feedback2": "b"}],
    }


def _helpsteer2_preference(n: int) -> dict[str, Any]:
    first, second = (0, 1) if n == 1 else (1, 0)
    return {
        "split": "train",
        "prompt": question(n),
        "response_1": answer(n, first),
        "response_2": answer(n, second),
        "preference_strength": -2 if n == 1 else 3,
        "preference_statement": "The first is better.",
        "preference_elaboration": "It is shorter.",
        "three_most_similar_preferences": [{"statement": "Better.", "elaboration": "Short.", "strength": -2}],
        "all_preferences_unprocessed": [{"strength": -2, "justification": "Short."}],
    }


def _nectar(n: int) -> dict[str, Any]:
    order = [3, 0, 6, 1, 5, 2, 4]
    return {
        "prompt": f"\n\nHuman: {question(n)}\n\nAssistant: ",
        "answers": [{"answer": answer(n, k), "model": "a", "rank": float(k + 1)} for k in order],
        "turns": 1,
        "num_responses": 7,
        "source": ["ultrachat"],
        "good_natured": True,
    }


def _ultrafeedback(n: int) -> dict[str, Any]:
    """Four answers, two of which score the same; one of the second row has no score."""
    scores = [2.0, 9.0, 2.0, 7.0] if n != 2 else [2.0, 9.0, None, 7.0]
    best = {1: 0, 3: 1, 0: 2, 2: 3}
    ratings = {name: {"Rating": "4", "Rationale": "Good."} for name in ("helpfulness", "honesty")}
    return {
        "source": "sharegpt",
        "instruction": question(n),
        "models": ["a", "b", "c", "d"],
        "completions": [
            {
                "annotations": ratings,
                "custom_system_prompt": "Be helpful.",
                "model": "a",
                "principle": "helpfulness",
                "response": answer(n, best[index]),
                "critique": "Good.",
                "fine-grained_score": 4.0,
                "overall_score": score,
            }
            for index, score in enumerate(scores)
        ],
        "correct_answers": ["None"],
        "incorrect_answers": ["None"],
    }


def _ultrafeedback_pairs(n: int) -> list[Pair]:
    pairs = [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3)] if n != 2 else [(0, 1), (0, 2), (1, 2)]
    return [(question(n), answer(n, i), answer(n, j)) for i, j in pairs]


def _message(name: str, parent: str | None, text: str, rank: int | None = None, **changes: Any) -> dict[str, Any]:
    return {
        "message_id": name,
        "parent_id": parent,
        "user_id": "u",
        "created_date": "2023-02-05T14:23:50+00:00",
        "text": text,
        "role": "assistant" if name[-2] == "a" else "prompter",
        "lang": "en",
        "review_count": 3,
        "review_result": True,
        "deleted": False,
        "rank": rank,
        "synthetic": False,
        "model_name": None,
        "message_tree_id": name.split(":")[0] + ":q0",
        "tree_state": "ready_for_export",
        "labels": {"name": ["spam"], "value": [0.0], "count": [3]},
        **changes,
    }


def _oasst(n: int) -> list[dict[str, Any]]:
    """A question and answers: the second best, one that nobody ranked, the best, one that is gone, the third; under the
    best a second question with two ranked answers and no more; under the one that is gone, a question that is lost."""
    return [
        _message(f"{n}:q0", None, question(n)),
        _message(f"{n}:a1", f"{n}:q0", answer(n, 1), 1),
        _message(f"{n}:a5", f"{n}:q0", answer(n, 5)),
        _message(f"{n}:a0", f"{n}:q0", answer(n, 0), 0),
        _message(f"{n}:q1", f"{n}:a0", "Why?"),
        _message(f"{n}:a7", f"{n}:q1", "Who knows?", 1),
        _message(f"{n}:a6", f"{n}:q1", "I counted.", 0),
        _message(f"{n}:q3", f"{n}:a6", "And then?"),
        _message(f"{n}:a8", f"{n}:q3", "I stopped.", 0),
        _message(f"{n}:a4", f"{n}:q0", answer(n, 4), 3, deleted=True),
        _message(f"{n}:q2", f"{n}:a4", "What?"),
        _message(f"{n}:a2", f"{n}:q0", answer(n, 2), 2),
        _message(f"{n}:a9", f"{n}:q0", "Buy!", 4, review_result=False),
    ]


def _oasst_pairs(n: int) -> list[Pair]:
    first = (("user", question(n)),)
    second = (*first, ("assistant", answer(n, 0)), ("user", "Why?"))
    return [*of(3, asked)(n), (second, "I counted.", "Who knows?")]


def _nested(n: int) -> dict[str, Any]:
    rows = {row["message_id"]: {**row, "replies": []} for row in _oasst(n)}
    for row in rows.values():
        row.pop("message_tree_id")
        if (parent := row["parent_id"]) is not None:
            rows[parent]["replies"].append(row)
    return {"message_tree_id": f"{n}:q0", "tree_state": "ready_for_export", "prompt": rows[f"{n}:q0"]}


OASST = {
    "no rank or score": 3,
    "deleted message": 3,
    "missing parent": 3,
    "message that failed review": 3,
    "question without ranked answers": 3,
    "only answer to its prompt": 3,
}
TREE_NEAR = ({"message_id": "id"}, {"parent_id": "parent"}, {"rank": "ranking", "text": "content"})


def kto(system: bool = False) -> Callable[[int], list[Any]]:
    def made(n: int) -> list[Any]:
        before = (("system", "Be brief."),) if system else ()
        return [((*before, ("user", question(n))), answer(n, n % 2), n % 2 == 0)]

    return made


def _kto(n: int, prompt: Any, completion: Any, **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "completion": completion, "label": n % 2 == 0, **more}


SHAPES = [
    Shape("trl-lib/ultrafeedback_binarized", lambda n: {**both(n), **BINARIZED}, chat_pair, CHOSEN),
    Shape(
        "HuggingFaceH4/ultrafeedback_binarized",
        _h4,
        chat_pair,
        CHOSEN,
        ("HuggingFaceH4/ultrafeedback_binarized", None, "train_prefs", None),
    ),
    Shape(
        "HuggingFaceH4/orca_dpo_pairs:test_prefs",
        lambda n: {**both(n), "prompt": question(n)},
        chat_pair,
        CHOSEN,
        ("HuggingFaceH4/orca_dpo_pairs", None, "test_prefs", None),
    ),
    Shape(
        "Anthropic/hh-rlhf:helpful-base:train",
        lambda n: {"chosen": dialogue(n, 0), "rejected": dialogue(n, 1)},
        lambda n: [(f"\n\nHuman: {question(n)}\n\nAssistant:", f" {answer(n, 0)}", f" {answer(n, 1)}")],
        CHOSEN,
        ("Anthropic/hh-rlhf", None, "train", "helpful-base"),
    ),
    Shape("OpenAssistant/oasst1", _oasst, _oasst_pairs, TREE_NEAR, unranked=OASST, joined=15),
    Shape(
        "OpenAssistant/oasst2",
        lambda n: [{k: v for k, v in row.items() if k != "labels"} for row in _oasst(n)],
        _oasst_pairs,
        TREE_NEAR,
        unranked=OASST,
        joined=15,
    ),
    Shape(
        "argilla/ultrafeedback-binarized-preferences-cleaned",
        lambda n: {
            "source": "s",
            "prompt": question(n),
            "chosen": said(n, 0),
            "chosen-rating": 5.0,
            "chosen-model": "a",
            "rejected": said(n, 1),
            "rejected-rating": 3.0,
            "rejected-model": "b",
        },
        chat_pair,
        CHOSEN,
    ),
    Shape(
        "argilla/dpo-mix-7k:test",
        lambda n: {"dataset": "d", **both(n), "chosen_rating": 5.0, "rejected_rating": 3.0},
        chat_pair,
        CHOSEN,
        ("argilla/dpo-mix-7k", None, "test", None),
    ),
    Shape("argilla/distilabel-capybara-dpo-7k-binarized", _capybara, _capybara_pair, CHOSEN),
    Shape(
        "argilla/distilabel-intel-orca-dpo-pairs",
        _argilla_orca,
        lambda n: system_pair(n) if n != 2 else [],
        ({"input": "query"}, CHOSEN[0], {"chosen": "accepted", "rejected": "refused", "input": "question"}),
        unranked={"no preference": 1},
    ),
    Shape(
        "argilla/distilabel-math-preference-dpo",
        lambda n: {
            "metadata": "{}",
            "instruction": question(n),
            "chosen_response": answer(n, 0),
            "chosen_rating": 9.0,
            "rejected_response": answer(n, 1),
            "rejected_rating": 5.0,
        },
        text_pair,
        ({"instruction": "problem"}, {"chosen_response": "accepted"}, {"rejected_response": "refused"}),
    ),
    Shape(
        "argilla/ultrafeedback-binarized-preferences",
        lambda n: {
            "source": "s",
            "instruction": question(n),
            "chosen_response": answer(n, 0),
            "rejected_response": answer(n, 1),
            "chosen_avg_rating": 5.0,
            "rejected_avg_rating": 3.0,
            "chosen_model": "a",
        },
        text_pair,
        ({"instruction": "query"}, {"chosen_response": "preferred"}, {"rejected_response": "dispreferred"}),
    ),
    Shape(
        "Intel/orca_dpo_pairs",
        lambda n: {
            "system": "Be brief.",
            "question": question(n),
            "chosen": answer(n, 0),
            "rejected": answer(n, 1),
        },
        system_pair,
        ({"question": "query"}, CHOSEN[0], {"question": "instruction", "rejected": "refused"}),
    ),
    Shape(
        "nvidia/HelpSteer2",
        _helpsteer2,
        lambda n: text_pair(n) if n != 3 else [],
        ({"prompt": "question"}, {"response": "answer"}, {"helpfulness": "rating"}),
        unranked={"no preference": 1},
        joined=3,
    ),
    Shape(
        "nvidia/HelpSteer2:preference:train",
        _helpsteer2_preference,
        text_pair,
        (
            {"prompt": "instruction"},
            {"response_1": "answer_a", "response_2": "answer_b"},
            {"preference_strength": "overall_preference"},
        ),
        ("nvidia/HelpSteer2", None, "train", "preference"),
    ),
    Shape(
        "nvidia/HelpSteer3:preference:validation",
        _helpsteer3,
        lambda n: chat_pair(n) if n != 3 else [],
        (
            {"context": "messages"},
            {"response1": "answer1", "response2": "answer2"},
            {"overall_preference": "preference"},
        ),
        ("nvidia/HelpSteer3", "preference", "validation", None),
        unranked={"no preference": 1},
    ),
    Shape(
        "berkeley-nest/Nectar",
        _nectar,
        of(7, lambda n: f"\n\nHuman: {question(n)}\n\nAssistant: "),
        ({"prompt": "question"}, {"answers": "responses"}, {"answers.answer": "text", "answers.rank": "ranking"}),
    ),
    Shape(
        "openbmb/UltraFeedback",
        _ultrafeedback,
        _ultrafeedback_pairs,
        (
            {"instruction": "question"},
            {"completions": "answers"},
            {"completions.response": "content", "completions.overall_score": "reward"},
        ),
    ),
    Shape(
        "snorkelai/Snorkel-Mistral-PairRM-DPO-Dataset:train_iteration_1",
        lambda n: {
            "prompt_id": f"{n}",
            "prompt": question(n),
            **both(n),
            "all_generated_responses": [answer(n, k) for k in range(5)],
            "all_rm_scores": [2.0, -1.0, 0.0, 0.5, 1.0],
        },
        chat_pair,
        CHOSEN,
        ("snorkelai/Snorkel-Mistral-PairRM-DPO-Dataset", None, "train_iteration_1", None),
    ),
    Shape(
        "allenai/llama-3.1-tulu-3-8b-preference-mixture",
        lambda n: {"id": f"{n}", "prompt": question(n), **both(n), "source": "s"},
        chat_pair,
        CHOSEN,
    ),
    Shape(
        "allenai/llama-3.1-tulu-3-405b-preference-mixture",
        lambda n: {
            "prompt": question(n),
            **both(n),
            "chosen_rating": 5.0,
            "rejected_rating": 1.0,
            "chosen_model": "a",
            "rejected_model": "b",
            "source": "s",
            "id": f"{n}",
        },
        chat_pair,
        CHOSEN,
    ),
    Shape(
        "allenai/ultrafeedback_binarized_cleaned",
        lambda n: {**_h4(n), "source": "s"},
        chat_pair,
        CHOSEN,
        ("allenai/ultrafeedback_binarized_cleaned", None, "train_prefs", None),
    ),
    Shape(
        "trl-lib/kto-mix-14k",
        lambda n: _kto(n, [user(question(n))], [assistant(answer(n, n % 2))]),
        kto(),
        SINGLE,
    ),
    Shape(
        "argilla/kto-mix-15k",
        lambda n: _kto(n, question(n), said(n, n % 2), rating=5.0, dataset="d"),
        kto(),
        SINGLE,
    ),
    Shape(
        "argilla/distilabel-intel-orca-kto",
        lambda n: _kto(
            n,
            question(n),
            answer(n, n % 2),
            system="Be brief.",
            rating=9.0,
            status="unchanged",
            in_gsm8k_train=False,
        ),
        kto(system=True),
        SINGLE,
    ),
    Shape(
        "PKU-Alignment/PKU-SafeRLHF",
        lambda n: {
            "prompt": question(n),
            "response_0": answer(n, n % 2),
            "response_1": answer(n, 1 - n % 2),
            "prompt_source": "s",
            "is_response_0_safe": True,
            "is_response_1_safe": True,
            "better_response_id": n % 2,
            "safer_response_id": 0,
        },
        text_pair,
        (
            {"prompt": "question"},
            {"response_0": "answer_0", "response_1": "answer_1"},
            {"better_response_id": "preferred_id"},
        ),
    ),
    Shape(
        "stanfordnlp/SHP",
        lambda n: {
            "post_id": f"p{n}",
            "history": question(n),
            "c_root_id_A": "a",
            "c_root_id_B": "b",
            "score_A": 3 + n % 2,
            "score_B": 4 - n % 2,
            "human_ref_A": answer(n, 1 - n % 2),
            "human_ref_B": answer(n, n % 2),
            "labels": n % 2,
            "score_ratio": 1.3,
        },
        text_pair,
        (
            {"history": "post"},
            {"human_ref_A": "comment_text_A", "human_ref_B": "comment_text_B"},
            {"score_A": "upvotes_A", "score_B": "upvotes_B"},
        ),
    ),
    Shape(
        "lvwerra/stack-exchange-paired",
        lambda n: {
            "qid": n,
            "question": question(n),
            "date": "2011/01/26",
            "metadata": ["m"],
            "response_j": answer(n, 0),
            "response_k": answer(n, 1),
        },
        text_pair,
        ({"question": "query"}, {"response_j": "better"}, {"response_j": "good", "response_k": "bad"}),
    ),
    Shape(
        "OpenAssistant/oasst1.trees",
        _nested,
        _oasst_pairs,
        (),
        unranked=OASST,
        joined=15,
    ),
]
"""As their cards describe them; none of their text is here."""
