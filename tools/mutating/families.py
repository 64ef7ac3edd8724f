"""Tokenizers of real chat templates: a base tokenizer with a family's control tokens, and the family's template."""

from pathlib import Path
from typing import Any, NamedTuple

THINK = ("<think>", "</think>")
CALLS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
CHATML = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
HEADERS = (
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|python_tag|>",
)
TURNS = ("<bos>", "<eos>", "<pad>", "<start_of_turn>", "<end_of_turn>")
CHANNELS = ("<|turn>", "<turn|>", "<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", "<|tool_response>")
DEEPSEEK = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>")
SPOKEN = ("<｜User｜>", "<｜Assistant｜>")
OUTPUTS = tuple(f"<｜tool▁{name}｜>" for name in ("calls▁begin", "calls▁end", "call▁begin", "call▁end", "sep"))
RESULTS = tuple(f"<｜tool▁{name}｜>" for name in ("outputs▁begin", "outputs▁end", "output▁begin", "output▁end"))
COHERE = tuple(f"<|{name}_TOKEN|>" for name in ("START_OF_TURN", "END_OF_TURN", "USER", "CHATBOT", "SYSTEM"))
LFM = ("<|startoftext|>", *CHATML, "<|tool_call_start|>", "<|tool_call_end|>")
HARMONY = ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>", "<|call|>", "<|startoftext|>")
PHI = ("<s>", "<|user|>", "<|assistant|>", "<|end|>", "<|system|>", "<|endoftext|>")
GLM = ("[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|system|>", "<|observation|>", "<|endoftext|>")


class Family(NamedTuple):
    """A template and the control tokens that its models' tokenizers have: flagged special, and plain."""

    template: str
    special: tuple[str, ...]
    plain: tuple[str, ...] = ()
    bos: str | None = None
    eos: str = "<|im_end|>"


FAMILIES = {
    "llama3": Family("llama3", HEADERS, bos=HEADERS[0], eos="<|eot_id|>"),
    "llama3_1": Family("llama3_1", HEADERS, bos=HEADERS[0], eos="<|eot_id|>"),
    "llama3_2": Family("llama3_2", HEADERS, bos=HEADERS[0], eos="<|eot_id|>"),
    "qwen2_5": Family("qwen2_5", CHATML, CALLS[:2]),
    "qwen3": Family("qwen3", CHATML, THINK + CALLS),
    "qwen3_2507": Family("qwen3_instruct_2507", CHATML, THINK + CALLS),
    "qwen3_5": Family("qwen3_5_think", CHATML, THINK + CALLS),
    "r1_distill": Family("deepseek_r1_distill", DEEPSEEK, SPOKEN + THINK + OUTPUTS + RESULTS, *DEEPSEEK),
    "deepseek_v3": Family("deepseekv3", DEEPSEEK, SPOKEN + THINK + OUTPUTS + RESULTS, *DEEPSEEK),
    "gemma": Family("gemma", TURNS, bos="<bos>", eos="<eos>"),
    "gemma3": Family("gemma3", TURNS, bos="<bos>", eos="<eos>"),
    "gemma4": Family("gemma4_v5", (*TURNS[:3], *CHANNELS, "<tool_response|>"), bos="<bos>", eos="<turn|>"),
    "phi3": Family("phi3", PHI, bos="<s>", eos="<|endoftext|>"),
    "phi3_5": Family("phi3_5", PHI, bos="<s>", eos="<|endoftext|>"),
    "glm4_5": Family("glm4moe", GLM, THINK + CALLS, eos="<|endoftext|>"),
    "gpt_oss": Family("gptoss", HARMONY, bos="<|startoftext|>", eos="<|return|>"),
    "cohere": Family("cohere", ("<BOS_TOKEN>", *COHERE), bos="<BOS_TOKEN>", eos="<|END_OF_TURN_TOKEN|>"),
    "lfm2_5": Family("lfm2_2_5_v2", LFM, THINK, bos="<|startoftext|>"),
    "nemotron3": Family("nemotron_3_nano", CHATML, THINK + CALLS),
}


def tokenizer_of(family: Family, templates: Path, base: Path) -> Any:
    """The base tokenizer with the family's tokens and template; as the family's, it puts BOS before texts."""
    from tokenizers import AddedToken, processors
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    made = AutoTokenizer.from_pretrained(str(base))
    for tokens, special in ((family.special, True), (family.plain, False)):
        made.add_tokens([AddedToken(token, special=special, normalized=False) for token in tokens])
    if family.bos is not None:
        first = made.convert_tokens_to_ids(family.bos)
        made.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{family.bos} $A", special_tokens=[(family.bos, first)]
        )
    names = {"bos_token": family.bos, "eos_token": family.eos, "pad_token": "<|pad|>"}
    made.add_tokens([AddedToken("<|pad|>", special=True, normalized=False)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made.backend_tokenizer, **{name: token for name, token in names.items() if token}
    )
    tokenizer.chat_template = (templates / f"{family.template}.jinja").read_text("utf-8")
    return tokenizer
