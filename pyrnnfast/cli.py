"""The command ``pyrnnfast``."""

import sys


def main() -> None:
    """Run the command line; without the packages that it needs, say which to install and exit with status 2.

    ``pyrnnfast info`` needs none of them.
    """
    if sys.argv[1:] == ["info"]:
        from .about import info

        print(info())
        return
    from .seq2seq.extras import MissingExtraError

    try:
        from .seq2seq.commands import app
    except MissingExtraError as error:
        print(f"pyrnnfast: {error}", file=sys.stderr)
        sys.exit(2)
    app(prog_name="pyrnnfast")
