"""``python -m neuronrank_cli``."""

from neuronrank_cli.app import main

main()
