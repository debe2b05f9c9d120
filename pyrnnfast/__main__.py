"""``python -m pyrnnfast``."""

from .cli import main

main()
