"""``python -m segmenter_fast`` starts the command line."""

from .cli import main

main()
