"""What is used of a tokenizer of transformers, which is imported only where one is loaded."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from dpo_jax.data.messages import Messages


@runtime_checkable
class Tokenizer(Protocol):
    """A `transformers.PreTrainedTokenizerBase`, as far as it is used here."""

    chat_template: str | dict[str, str] | None
    """A text, or several by name."""
    bos_token: str | None
    eos_token: str | None
    eos_token_id: int | None
    bos_token_id: int | None

    backend_tokenizer: Any
    """Of the package tokenizers."""

    @property
    def special_tokens_map(self) -> Mapping[str, Any]:
        """The named special tokens."""
        ...

    @property
    def added_tokens_decoder(self) -> Mapping[int, Any]:
        """Tokens beside the vocabulary, by id, each with `content` and `special`."""
        ...

    def __len__(self) -> int:
        """How many ids there are."""
        ...

    def __call__(self, text: str | list[str], **options: object) -> Mapping[str, Any]:
        """`input_ids` of a text, or of each of several."""
        ...

    def apply_chat_template(self, conversation: Messages, **options: object) -> Any:
        """A conversation as text, or as ids."""
        ...

    def get_vocab(self) -> dict[str, int]:
        """Id of each token."""
        ...

    def decode(self, token_ids: Sequence[int], **options: object) -> str:
        """Ids as text."""
        ...
