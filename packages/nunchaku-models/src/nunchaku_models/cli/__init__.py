"""The command `nunchaku`. One module per subcommand, with `register(subparsers)`; heavy imports wait until it runs."""
