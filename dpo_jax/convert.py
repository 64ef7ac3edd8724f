"""Reads a Hugging Face folder and writes it again: `python -m dpo_jax.convert SOURCE TARGET [--dtype bfloat16]`.

The tensors, files and tokenizer that come out are those that went in, read back and verified before the folder stands.
Weights are changed only by `--dtype`, which rounds them to nearest even.
"""

import sys
from collections.abc import Sequence

from dpo_jax.config import Parser, command, quiet_libraries
from dpo_jax.settings import UserError


@command
def main(argv: Sequence[str]) -> None:
    """The command."""
    parser = Parser("convert", "Write a Hugging Face model folder again, every byte verified.")
    parser.add_argument("source", help="model folder, or hub id")
    parser.add_argument("target", help="folder to write; it must not exist yet, or be empty")
    parser.add_argument(
        "--dtype", choices=["keep", "float32", "bfloat16"], default="keep", help="of the weights written"
    )
    parser.add_argument("--max-shard-gb", type=float, help="split anew into files of at most this many GB (10^9 bytes)")
    options = parser.parse_args(argv)
    if options.max_shard_gb is not None and not 0 < options.max_shard_gb < 1e6:
        raise UserError(f"--max-shard-gb {options.max_shard_gb}: a number above zero is wanted")
    quiet_libraries()

    from dpo_jax.hf.checkpoint import load_hf, save_hf

    model = load_hf(options.source)
    limit = None if options.max_shard_gb is None else max(1, round(options.max_shard_gb * 1e9))
    save_hf(model, options.target, options.source, dtype=options.dtype, max_shard_bytes=limit)
    print(f"wrote and verified {options.target}")


if __name__ == "__main__":
    sys.exit(main())
