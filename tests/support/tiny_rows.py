"""A tokenizer of single bytes and rows of preference data that are small enough to read."""

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<pad>", "<eos>", "<|im_start|>", "<|im_end|>", "<bos>"]


def byte_tokenizer(*, bos: bool = False, template: str | None = CHATML, merges: tuple = ()):
    """One token per byte, plus merges; with `bos`, every text begins with <bos>."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *letters, *(a + b for a, b in merges)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    if bos:
        single = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", vocabulary["<bos>"])])
        tokenizer.post_processor = single
    names = {"pad_token": "<pad>", "eos_token": "<eos>", **({"bos_token": "<bos>"} if bos else {})}
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    made.chat_template = template
    return made


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def write(path: Path, *rows) -> Path:
    """A JSONL file; rows that are bytes are written as they are."""
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


HI, YO, NO = [user("Hi?")], [assistant("Yo")], [assistant("No")]
GOOD = {"prompt": "Hi", "chosen": "yes", "rejected": "no"}
CHAT = {"prompt": HI, "chosen": YO, "rejected": NO}
IDS = {"prompt_ids": [70], "chosen_ids": [71], "rejected_ids": [72]}
RANKED = {"prompt": "p", "completions": ["a", "b"], "ranks": [1, 2]}
SCORED = {"prompt": "p", "completion": "a", "score": 1}
TREE = [  # of one question, which is answered twice
    {"message_id": "q", "parent_id": None, "role": "prompter", "text": "Hi?", "rank": None},
    {"message_id": "n", "parent_id": "q", "role": "assistant", "text": "No", "rank": 1},
    {"message_id": "y", "parent_id": "q", "role": "assistant", "text": "Yo", "rank": 0},
]
OPENAI = {"input": {"messages": HI}, "preferred_output": YO, "non_preferred_output": NO}
SHAREGPT = {
    "conversations": [{"from": "human", "value": "Hi?"}],
    "chosen": {"from": "gpt", "value": "Yo"},
    "rejected": {"from": "gpt", "value": "No"},
}
IMPLICIT = {"chosen": "It is so", "rejected": "It is not"}
UNPAIRED = {"prompt": "Hi", "completion": "yes", "label": True}
COMPLETION = {"prompt": "Hi", "completion": "yes"}
MESSAGES = {"messages": HI + YO}


def yes_or_no(count: int) -> list[dict]:
    """Rows of one turn, whose better answers say yes, some several times, and whose worse ones say no."""
    return [
        {"prompt": [user(f"Say {n}")], "chosen": [assistant("yes " * (n % 5 + 1))], "rejected": [assistant("no" * n)]}
        for n in range(1, count + 1)
    ]
