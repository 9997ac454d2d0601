"""``python -m fewbit.cli``."""

from fewbit.cli import main

main()
