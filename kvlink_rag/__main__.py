"""``python -m kvlink_rag``: the command line."""

from kvlink_rag.cli import main

main()
