"""Chat templates that do what those of real families do, as short as they can be, and tokenizers for them."""

from tokenizers import AddedToken

from tests.support.tiny_rows import byte_tokenizer

TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
"""Control tokens that mark no turn and are not flagged special, as in Qwen3's tokenizer."""

HEADERS = ("<|user|>", "<|assistant|>", "<|tool|>")
"""Control tokens that mark turns and are not flagged special either, as in DeepSeek's tokenizer."""

THINKING = (
    "{% for t in tools or [] %}[{{ t.function | tojson }}]{% endfor %}"
    "{% for m in messages %}"
    "{% if m.role == 'tool' %}<|im_start|>user\n<tool_response>\n{{ m.content }}\n</tool_response>"
    "{% else %}<|im_start|>{{ m.role }}\n{% set content = m.content or '' %}"
    "{% if m.role == 'assistant' %}"
    "{% set thought = m.reasoning_content or '' %}"
    "{% if '</think>' in content %}"
    "{% set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if loop.last or thought %}<think>\n{{ thought }}\n</think>\n\n{% endif %}{% endif %}"
    "{{ content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>\n"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>{% endfor %}'
    "{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Qwen3's ways: thoughts are taken out of a content and written before it, also where there are none in the last turn;
calls are JSON; what tools answer is in a user's turn."""

CUTTING = (
    "<bos>{% for m in messages %}"
    "{% if m.role == 'tool' %}<|tool|>{{ m.content }}"
    "{% elif m.role == 'user' %}<|user|>{{ m.content }}"
    "{% elif m.role == 'assistant' %}<|assistant|>{{ m.content.split('</think>')[-1] }}<eos>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
)
"""R1's ways: thoughts are cut, system turns and calls are not written, the prompt begins the thoughts."""

TEXT_CALLS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name + ' ' + c.function.arguments }}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""DeepSeek V3's way: arguments must be JSON text."""

ENDLESS = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
"""GLM's way: a turn ends where the next begins."""


def tokenizer_with(template: str, *, bos: bool = False, tags: tuple[str, ...] = TAGS + HEADERS):
    """A tokenizer of bytes with a template and with control tokens that are not flagged special."""
    tokenizer = byte_tokenizer(template=template, bos=bos)
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in tags])
    return tokenizer


def call(name: str, arguments: object, content: str = "") -> dict:
    """A turn that calls a tool."""
    function = {"name": name, "arguments": arguments}
    return {"role": "assistant", "content": content, "tool_calls": [{"type": "function", "function": function}]}


def result(content: str) -> dict:
    """What a tool answers."""
    return {"role": "tool", "content": content}


TOOL = {"type": "function", "function": {"name": "rain", "parameters": {"type": "object", "properties": {}}}}
