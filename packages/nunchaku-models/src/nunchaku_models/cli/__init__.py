"""The command `nunchaku`. Each subcommand is one module with `register(subparsers)`; heavy imports wait until it runs."""
