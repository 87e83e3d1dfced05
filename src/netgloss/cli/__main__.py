from netgloss.cli import main

main()
