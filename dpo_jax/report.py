"""`python -m dpo_jax.report RUN [RUN ...]`: the page of a run drawn again, or a page that compares several."""

import sys
from collections.abc import Sequence

from dpo_jax.config import command as commands


@commands.command
def main(argv: Sequence[str]) -> int:
    """Read the arguments, draw, and print where the page is."""
    parser = commands.Parser("report")
    parser.add_argument("runs", metavar="RUN", nargs="+", help="output folder of a run")
    parser.add_argument("--output", metavar="FILE", help="of a comparison (default: comparison.html)")
    parser.add_argument("--title", default="Runs compared", help="of a comparison")
    options = parser.parse_args(list(argv))
    if len(options.runs) == 1 and options.output is not None:
        parser.error("--output is of a comparison; the page of one run is its report.html")
    from dpo_jax.page.render import write_comparison, write_page

    if len(options.runs) == 1:
        print(write_page(options.runs[0]))
    else:
        print(write_comparison(options.runs, options.output or "comparison.html", title=options.title))
    return 0


if __name__ == "__main__":
    sys.exit(main())
