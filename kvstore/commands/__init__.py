"""The store's subcommands of `antefix`: `add_arguments(parser)` and `run(args) -> exit code` each."""
