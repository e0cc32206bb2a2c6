"""`python -m deploykit` is the `deploykit` command."""

from deploykit.cli import main

main()
