"""``python -m netgloss.cli`` runs the command line."""

from netgloss.cli import main

main()
