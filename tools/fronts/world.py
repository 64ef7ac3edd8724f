"""A small world of film reviews: how they are written, how good one is, exactly, and who prefers which of two.

A review is a few sentences with a mood. Its reward is known exactly, a rule over its words: half of what its praise is
more than its blame. Preferences are drawn by the Bradley-Terry model of that reward,

    P(a is preferred to b) = S(reward(a) - reward(b)),       S the sigmoid.
"""

import json
import math
import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers

PRAISE = (
    "great wonderful brilliant charming clever funny moving splendid superb delightful lovely gripping fresh warm "
    "elegant"
).split()
BLAME = ("awful dull clumsy boring silly tedious dreadful weak stale hollow noisy cheap bland messy pointless").split()
PLAIN = "long short slow quiet loud dark bright modern old simple strange new usual early late".split()
LIKED, DISLIKED, SAW = (
    "loved enjoyed admired adored".split(),
    "hated disliked regretted endured".split(),
    "watched saw noticed heard".split(),
)
THINGS = (
    "film story plot acting cast music ending opening script dialogue camera director lead hero villain pace humour "
    "scenery costumes editing"
).split()
DEGREES = "very rather quite really truly mostly somewhat always".split()
FRAMES = (
    "the {thing} was {adjective} .",
    "the {thing} was {degree} {adjective} .",
    "i {verb} the {thing} .",
    "i {verb} the {adjective} {thing} .",
    "what a {adjective} {thing} !",
    "the {thing} felt {adjective} and the {thing} was {adjective} .",
    "my friend {verb} the {thing} too .",
    "a {adjective} {thing} , a {adjective} {thing} .",
    "in the end the {thing} was {degree} {adjective} .",
)
MOODS = {
    "glad": (0.60, 0.10, 0.30),
    "sour": (0.10, 0.60, 0.30),
    "even": (0.25, 0.25, 0.50),
}
"""How often a word that can praise or blame does: chances of praise, blame and neither."""
PAD, START, END = "<pad>", "<s>", "</s>"
WORTH = {**dict.fromkeys([*PRAISE, *LIKED], 0.5), **dict.fromkeys([*BLAME, *DISLIKED], -0.5)}


def reward(review: str) -> float:
    """Half of what the words of praise are more than those of blame."""
    return sum(WORTH.get(word, 0.0) for word in review.split())


def sentence(mood: str, rng: random.Random) -> str:
    """A sentence in a mood."""

    def one(kinds: Sequence[Sequence[str]]) -> str:
        return rng.choice(rng.choices(kinds, MOODS[mood])[0])

    text = rng.choice(FRAMES)
    slots = {
        "{adjective}": lambda: one((PRAISE, BLAME, PLAIN)),
        "{verb}": lambda: one((LIKED, DISLIKED, SAW)),
        "{thing}": lambda: rng.choice(THINGS),
        "{degree}": lambda: rng.choice(DEGREES),
    }
    for slot, fill in slots.items():
        while slot in text:
            text = text.replace(slot, fill(), 1)
    return text


def review(rng: random.Random) -> tuple[str, str]:
    """A prompt, the first sentence, and what follows: two to four more, mostly in the same mood."""
    mood = rng.choice(list(MOODS))
    first = sentence(mood, rng)
    after = mood if rng.random() < 0.6 else rng.choice(list(MOODS))
    return first, " " + " ".join(sentence(after, rng) for _ in range(rng.randint(2, 4)))


def prompts(count: int, seed: str, without: Iterable[str] = ()) -> list[str]:
    """Different first sentences, none of them among those `without` which it shall be."""
    rng, found, refused = random.Random(seed), dict[str, None](), set(without)
    while len(found) < count:
        if (first := review(rng)[0]) not in refused:
            found[first] = None
    return list(found)


def preferred(answers: Sequence[str], rng: random.Random) -> tuple[str, str]:
    """Two answers as (chosen, rejected), drawn by the Bradley-Terry model of the reward."""
    first, second = answers
    chance = 1 / (1 + math.exp(reward(second) - reward(first)))
    return (first, second) if rng.random() < chance else (second, first)


# ---------------------------------------------------------------------------------------------- files


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """One JSON object per line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_reviews(path: Path, count: int, seed: int) -> None:
    """Reviews to learn the language from."""
    rng = random.Random(f"reviews {seed}")
    told = (review(rng) for _ in range(count))
    write_jsonl(path, [{"prompt": prompt, "completion": rest} for prompt, rest in told])


def tokenizer() -> Tokenizer:
    """A token for each word."""
    words = {word for frame in FRAMES for word in frame.split() if not word.startswith("{")}
    known = [*PRAISE, *BLAME, *PLAIN, *LIKED, *DISLIKED, *SAW, *THINGS, *DEGREES, *sorted(words)]
    table = {word: number for number, word in enumerate(dict.fromkeys([PAD, START, END, *known]))}
    made = Tokenizer(models.WordLevel(table, unk_token=PAD))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens([PAD, START, END])
    return made


def write_blank_model(folder: Path, *, width: int, layers: int) -> None:
    """The folder of a Llama for this tokenizer, without weights."""
    folder.mkdir(parents=True, exist_ok=True)
    made = tokenizer()
    made.save(str(folder / "tokenizer.json"))
    names = {"eos_token": END, "pad_token": PAD, "bos_token": START, "model_max_length": 128}
    ends = {"eos_token_id": made.token_to_id(END), "pad_token_id": made.token_to_id(PAD)}
    ends |= {"bos_token_id": made.token_to_id(START)}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": made.get_vocab_size(),
        "hidden_size": width,
        "intermediate_size": 3 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 32,
        "num_key_value_heads": width // 32,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": True,
        "dtype": "float32",
        **ends,
    }
    tables = {
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", **names},
        "config.json": config,
        "generation_config.json": {**ends, "do_sample": False},
    }
    for name, table in tables.items():
        (folder / name).write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
