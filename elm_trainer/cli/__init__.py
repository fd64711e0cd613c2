"""The console script `elm`, a module to each subcommand."""
