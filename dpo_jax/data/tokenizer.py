"""What is used of a tokenizer of transformers, which is imported only where one is loaded."""

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from dpo_jax.data.messages import Messages
from dpo_jax.errors import UserError
from dpo_jax.files import configs_folder


@runtime_checkable
class Tokenizer(Protocol):
    """A `transformers.PreTrainedTokenizerBase`, as far as it is used here."""

    chat_template: str | dict[str, str] | None
    """A text, or several by name."""
    if TYPE_CHECKING:  # transformers makes these when they are asked for, which isinstance does not since Python 3.12
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

    def convert_ids_to_tokens(self, ids: int) -> str:
        """A token as the vocabulary has it."""
        ...

    def get_vocab(self) -> dict[str, int]:
        """Id of each token."""
        ...

    def decode(self, token_ids: Sequence[int], **options: object) -> str:
        """Ids as text."""
        ...


def special_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """Ids that are tokens of their own and no text: more than the named ones, `all_special_ids`."""
    return frozenset(index for index, token in tokenizer.added_tokens_decoder.items() if token.special)


def added_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """Ids of all control tokens, special or not: those beside the vocabulary that are more than white space."""
    added = tokenizer.added_tokens_decoder.items()
    return frozenset(index for index, token in added if token.special or token.content.strip("\u2581 \t\r\n"))


def rows_for(tokenizer: Tokenizer) -> int:
    """Rows that an embedding must have for every token of a tokenizer."""
    return max(len(tokenizer), 1 + max(tokenizer.get_vocab().values(), default=0))


def no_template(where: str) -> UserError:
    """What to raise where messages are met and no chat template is known; `where` is the row."""
    plain = os.path.relpath(configs_folder() / "plain.jinja")
    return UserError(
        f"{where}: messages need a chat template and the tokenizer has none; give a Jinja file, such as "
        f"data.template={plain}"
    )
