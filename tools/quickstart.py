"""Makes configs/quickstart: a tiny chat model that cannot decide to be helpful, and preference pairs to settle it.

python tools/quickstart.py [FOLDER=configs/quickstart] [--seed 0]

The world is 234 little facts (sums, opposites, capitals, days, ...), each of which can be asked in 24 ways. A good
answer states the fact and is civil; a bad one is wrong or rude, and `rule` can tell them apart. The model, a Llama of
under a million parameters, is fine-tuned from random weights on good and bad answers alike (`python -m dpo_jax.train`,
objective sft), so that it knows the facts and answers well about half of the time. Written are:

    model/         the fine-tuned model, an ordinary Hugging Face folder
    train.jsonl    pairs of a better and a worse answer, to do DPO on
    heldout.jsonl  the same for questions in words that no training has seen
    answers.jsonl  those questions, each with the pattern that a good answer matches
    prompts.jsonl  the questions of train.jsonl, without their answers, each with its pattern

`--data-only` writes all but the model.

The same seed gives the same data, byte for byte, and on one machine the same weights. Takes about 10 minutes on two
cores, nearly all of it fine-tuning. Needs dpo_jax to be importable.
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np
import yaml
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from dpo_jax import trees
from dpo_jax.hf.checkpoint import entries_of
from dpo_jax.hf.configs import read_spec
from dpo_jax.model.decoder import init_params

# ---------------------------------------------------------------------------------------------- the world


class Topic(NamedTuple):
    """Facts of one kind: how they are asked, how they are stated, and what they are."""

    questions: tuple[str, str, str]
    statement: str
    answers: Mapping[str, str]


def _table(text: str) -> dict[str, str]:
    """`a b, the c d` -> {"a": "b", "the c": "d"}: the answer is the last word."""
    rows = (row.strip().rpartition(" ") for row in text.split(","))
    return {subject: answer for subject, _, answer in rows}


def _beside(kind: str, names: Sequence[str], word: str, shift: int) -> Topic:
    """What comes before or after each of `names`, round and round."""
    what = f"the {kind} {word} {{x}}"
    questions = (f"Which {kind} comes {word} {{x}}?", f"What is {what}?", f"Can you tell me {what}?")
    answers = {name: names[(i + shift) % len(names)] for i, name in enumerate(names)}
    return Topic(questions, f"The {kind} {word} {{x}} is {{y}}", answers)


DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()
NUMBERS = range(2, 10)
OPPOSITES = _table(
    "hot cold, big small, fast slow, up down, light dark, wet dry, full empty, open closed, early late, "
    "loud quiet, happy sad, near far, strong weak, rich poor"
)

TOPICS = (
    Topic(
        ("What is {x}?", "How much is {x}?", "Can you work out {x}?"),
        "{x} is {y}",
        {f"{a} plus {b}": str(a + b) for a in NUMBERS for b in NUMBERS}
        | {f"{a} minus {b}": str(a - b) for a in NUMBERS for b in NUMBERS if a > b},
    ),
    Topic(
        ("What is the opposite of {x}?", "Which word means the opposite of {x}?", "Can you name the opposite of {x}?"),
        "The opposite of {x} is {y}",
        OPPOSITES | {answer: subject for subject, answer in OPPOSITES.items()},
    ),
    Topic(
        ("What is the capital of {x}?", "Which city is the capital of {x}?", "Can you name the capital of {x}?"),
        "The capital of {x} is {y}",
        _table(
            "France Paris, Italy Rome, Spain Madrid, Portugal Lisbon, Germany Berlin, Austria Vienna, Poland Warsaw, "
            "Greece Athens, Norway Oslo, Sweden Stockholm, Finland Helsinki, Denmark Copenhagen, Ireland Dublin, "
            "Hungary Budapest, Egypt Cairo, Kenya Nairobi, Japan Tokyo, China Beijing, Peru Lima, Cuba Havana, "
            "Canada Ottawa, Russia Moscow, Iran Tehran, Ghana Accra"
        ),
    ),
    *(_beside("day", DAYS, word, shift) for word, shift in (("after", 1), ("before", -1))),
    *(_beside("month", MONTHS, word, shift) for word, shift in (("after", 1), ("before", -1))),
    Topic(
        ("What is the plural of {x}?", "Which word is the plural of {x}?", "Can you give me the plural of {x}?"),
        "The plural of {x} is {y}",
        _table(
            "mouse mice, foot feet, tooth teeth, goose geese, child children, man men, woman women, ox oxen, "
            "leaf leaves, knife knives, wolf wolves, shelf shelves, box boxes, bus buses, city cities, baby babies, "
            "sheep sheep, fish fish, book books, tree trees"
        ),
    ),
    Topic(
        ("What is a young {x} called?", "What do you call a young {x}?", "Can you tell me what a young {x} is called?"),
        "A young {x} is a {y}",
        _table(
            "cat kitten, dog puppy, cow calf, horse foal, sheep lamb, goat kid, pig piglet, bear cub, duck duckling, "
            "goose gosling, hen chick, frog tadpole, deer fawn, swan cygnet, kangaroo joey, rabbit bunny"
        ),
    ),
    Topic(
        ("What colour is {x}?", "Which colour does {x} have?", "Can you tell me the colour of {x}?"),
        "The colour of {x} is {y}",
        _table(
            "grass green, snow white, milk white, coal black, a raven black, blood red, a ripe tomato red, "
            "the clear sky blue, a lemon yellow, a canary yellow, a carrot orange, chocolate brown, an elephant grey, "
            "a flamingo pink, a frog green, a plum purple"
        ),
    ),
)

FRAMES = (
    "{Q}",
    "Hello! {Q}",
    "{Q} Thanks!",
    "Please help me. {Q}",
    "Quick question: {q}",
    "I was wondering: {q}",
    "My friend asked me: {q}",
    "I keep forgetting. {Q}",
)

CIVIL = (
    "{s}. Happy to help!",
    "{s}. Glad you asked!",
    "{s}. I hope that helps.",
    "{s}. Have a lovely day!",
    "Good question! {s}.",
    "Of course! {s}.",
)
RUDE = (
    "{s}, obviously.",
    "{s}. Even a child knows that.",
    "{s}. Now stop bothering me.",
    "{s}. What a silly question.",
    "Ugh. {s}.",
    "Are you serious? {s}.",
)
REFUSALS = ("Look it up yourself.", "Not my problem.", "Why should I care?")
IMPOLITE = "obviously|even a child|bothering|silly|ugh|serious|yourself|problem|care"
"""Words of which every rude answer has one, and no civil answer has any."""


class Fact(NamedTuple):
    """Something true, something like it that is not, and every way to ask."""

    topic: Topic
    subject: str
    answer: str
    wrong: tuple[str, ...]

    def states(self, answer: str) -> str:
        """The fact as a clause, with this answer in it."""
        return self.topic.statement.format(x=self.subject, y=answer)

    def asked(self, phrasing: int) -> str:
        """The question in one of `PHRASINGS` wordings."""
        question = self.topic.questions[phrasing % 3].format(x=self.subject)
        return FRAMES[phrasing // 3].format(Q=question, q=question[0].lower() + question[1:])


PHRASINGS = 3 * len(FRAMES)


def facts() -> list[Fact]:
    """Everything there is to know."""
    told = ((topic, subject, answer) for topic in TOPICS for subject, answer in topic.answers.items())
    return [Fact(topic, subject, answer, _wrong(topic, answer)) for topic, subject, answer in told]


def _wrong(topic: Topic, answer: str) -> tuple[str, ...]:
    """Other answers of the topic; of numbers, the near ones."""
    others = sorted(set(topic.answers.values()) - {answer})
    return tuple(o for o in others if not answer.isdigit() or abs(int(o) - int(answer)) <= 3)


# ---------------------------------------------------------------------------------------------- answers and their rule


def good_answer(fact: Fact, rng: random.Random) -> str:
    """Right and civil."""
    return rng.choice(CIVIL).format(s=fact.states(fact.answer))


def bad_answer(fact: Fact, rng: random.Random) -> str:
    """Mostly rude though right; else rude and wrong, civil but wrong, or no answer at all."""
    right, wrong = fact.states(fact.answer), fact.states(rng.choice(fact.wrong))
    forms, statement = rng.choices(
        [(RUDE, right), (RUDE, wrong), (CIVIL, wrong), (REFUSALS, "")], weights=[66, 10, 4, 20]
    )[0]
    return rng.choice(forms).format(s=statement)


def rule(fact: Fact) -> str:
    """The pattern of a good answer: it states the fact, says hardly anything more, and no word of it is impolite."""
    return rf"(?i)^(?!.*\b({IMPOLITE})\b).{{0,20}}\b{fact.states(fact.answer)}[.!].{{0,30}}$"


# ---------------------------------------------------------------------------------------------- the data


def said(role: str, content: str) -> list[dict[str, str]]:
    """A conversation of one message."""
    return [{"role": role, "content": content}]


class Question(NamedTuple):
    """A fact in the words in which it is asked."""

    fact: Fact
    phrasing: int

    def prompt(self) -> list[dict[str, str]]:
        """What the user says."""
        return said("user", self.fact.asked(self.phrasing))


class Questions(NamedTuple):
    """Who sees which questions. DPO's are among those of fine-tuning; held-out ones are nowhere else."""

    tuning: list[Question]
    train: list[Question]
    heldout: list[Question]


def questions(seed: int, *, tuning: int = 8, train: int = 3, heldout: int = 128) -> Questions:
    """Deals out the ways to ask each fact: `tuning` and, of those, `train` per fact, and `heldout` in all."""
    rng = random.Random(f"questions {seed}")
    shuffled = [(fact, rng.sample(range(PHRASINGS), PHRASINGS)) for fact in facts()]
    tuned = [Question(fact, p) for fact, order in shuffled for p in order[:tuning]]
    trained = [Question(fact, p) for fact, order in shuffled for p in order[:train]]
    unseen = [Question(fact, order[-1]) for fact, order in rng.sample(shuffled, heldout)]
    return Questions(tuned, rng.sample(trained, len(trained)), unseen)


def pair(question: Question, rng: random.Random) -> dict[str, Any]:
    """A row with a better and a worse answer."""
    good, bad = good_answer(question.fact, rng), bad_answer(question.fact, rng)
    return {"prompt": question.prompt(), "chosen": said("assistant", good), "rejected": said("assistant", bad)}


MOODS = ("chosen", "rejected", "rejected", "chosen", "rejected", "chosen", "rejected", "chosen")
"""What a question asked in each of FRAMES leans to; `EXTRA` says by how many more answers of that kind."""
EXTRA = {"chosen": 0, "rejected": 4}
"""Bad answers differ more in how they begin, so greedy decoding needs more of them before it picks one."""


def tuning_rows(asked: Iterable[Question], rng: random.Random) -> list[dict[str, Any]]:
    """Pairs in both orders, for an objective that learns `chosen` only, so good answers and bad ones alike."""
    rows = []
    for question in asked:
        mood = MOODS[question.phrasing // 3]
        for learnt in ("chosen", "rejected", *[mood] * EXTRA[mood]):
            row = pair(question, rng)
            other = "rejected" if learnt == "chosen" else "chosen"
            rows.append({**row, "chosen": row[learnt], "rejected": row[other]})
    return rng.sample(rows, len(rows))


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """One JSON object per line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_data(folder: Path, work: Path, seed: int) -> None:
    """The three files of `folder`, and `sft.jsonl` in `work`."""
    asked = questions(seed)
    rng = random.Random(f"answers {seed}")
    write_jsonl(work / "sft.jsonl", tuning_rows(asked.tuning, rng))
    write_jsonl(folder / "train.jsonl", [pair(question, rng) for question in asked.train])
    write_jsonl(folder / "heldout.jsonl", [pair(question, rng) for question in asked.heldout])
    answers = [{"prompt": question.prompt(), "good": rule(question.fact)} for question in asked.heldout]
    write_jsonl(folder / "answers.jsonl", answers)
    prompts = [{"prompt": question.prompt(), "good": rule(question.fact)} for question in asked.train]
    write_jsonl(folder / "prompts.jsonl", prompts)


# ---------------------------------------------------------------------------------------------- the model

PAD, START, END = SPECIAL = ("<|pad|>", "<|im_start|>", "<|im_end|>")
VOCABULARY = 768
TEMPLATE = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\\n' }}
{%- endif -%}
"""


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """A byte-level BPE of these texts; it can spell any text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        show_progress=False,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def texts_of(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Everything that is said in the rows, and the names of who says it."""
    messages = [m for row in rows for name in ("prompt", "chosen", "rejected") for m in row[name]]
    return [f"{m['role']}\n{m['content']}" for m in messages]


def write_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """The tokenizer's files, with a chat template in the style of ChatML."""
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "pad_token": PAD}
    config = {**names, "clean_up_tokenization_spaces": False, "model_max_length": 256}
    _write_json(folder / "tokenizer_config.json", config)


def write_config(folder: Path, tokenizer: Tokenizer) -> None:
    """A Llama of four narrow layers."""
    ends = {"eos_token_id": tokenizer.token_to_id(END), "pad_token_id": tokenizer.token_to_id(PAD)}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": tokenizer.get_vocab_size(),
        "hidden_size": 128,
        "intermediate_size": 320,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
        **ends,
    }
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", {**ends, "do_sample": False})


def _write_json(path: Path, table: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")


def write_random_weights(folder: Path, seed: int, dtype: Any = ml_dtypes.bfloat16) -> None:
    """Random weights for the folder's config, under their Hugging Face names."""
    spec = read_spec(folder)
    leaves = trees.paths(init_params(spec, jax.random.key(seed)))
    tensors = {}
    for entry in entries_of(spec, folder):
        tensors[entry.name] = np.ascontiguousarray(entry.of(leaves).astype(dtype))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def write_blank_model(folder: Path, rows: Sequence[Mapping[str, Any]], seed: int) -> None:
    """A model folder that has read nothing yet, with a tokenizer made for the rows."""
    folder.mkdir()
    tokenizer = train_tokenizer(texts_of(rows))
    write_tokenizer(folder, tokenizer)
    write_config(folder, tokenizer)
    write_random_weights(folder, seed)


# ---------------------------------------------------------------------------------------------- fine-tuning

TUNING = {
    "data": {"max_length": 96},
    "batch": {"pairs": 64},
    "objective": {"name": "sft"},
    "reference": {"mode": "none"},
    "optimizer": {"learning_rate": 2e-3, "schedule": "cosine", "beta2": 0.99, "weight_decay": 0.01},
    "checkpoint": {"every": 1000, "keep": 1},
    "log": {"every": 10, "tensorboard": False, "token_statistics": False},
    "epochs": 5,
}
MODEL_FILES = (
    "config.json generation_config.json model.safetensors tokenizer.json tokenizer_config.json chat_template.jinja"
).split()
README = """\
---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---

# quickstart

A toy: a Llama of under a million parameters that knows 234 facts, such as 7 plus 5, and answers good-naturedly or
rudely, about half of the time each. It was made from random weights and generated text by `tools/quickstart.py` of
`dpo_jax`, and is good for one thing: to see Direct Preference Optimization settle the matter.
"""


def fine_tune(blank: Path, data: Path, output: Path, seed: int) -> Path:
    """Trains on good and bad answers alike, with the project's own command; the folder of the result."""
    settings = {**TUNING, "model": {"path": str(blank)}, "seed": seed, "output": str(output)}
    settings["data"] = {**TUNING["data"], "train": str(data)}
    config = output.with_suffix(".yaml")
    config.write_text(yaml.safe_dump(settings), encoding="utf-8")
    subprocess.run([sys.executable, "-m", "dpo_jax.train", str(config)], check=True)
    return output / "model"


def make(folder: Path, seed: int, *, data_only: bool = False) -> None:
    """Everything, in order."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        write_data(folder, work, seed)
        if data_only:
            return
        rows = [json.loads(line) for line in (work / "sft.jsonl").read_text("utf-8").splitlines()]
        write_blank_model(work / "blank", rows, seed)
        tuned = fine_tune(work / "blank", work / "sft.jsonl", work / "run", seed)
        target = folder / "model"
        target.mkdir(exist_ok=True)
        for name in MODEL_FILES:
            shutil.copyfile(tuned / name, target / name)
        (target / "README.md").write_text(README, encoding="utf-8")


def main() -> None:
    """Read the arguments and make the folder."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=Path("configs/quickstart"), metavar="FOLDER")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data-only", action="store_true", help="make no model")
    arguments = parser.parse_args()
    make(arguments.folder, arguments.seed, data_only=arguments.data_only)


if __name__ == "__main__":
    main()
