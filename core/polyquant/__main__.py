"""`python -m polyquant` is the `polyquant` command."""

from polyquant.cli.main import main

main()
