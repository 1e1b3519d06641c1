"""One module per subcommand: `register(subparsers)` adds its arguments, `run(arguments)` returns the exit code.

The modules import what they need inside their functions, so that --help loads nothing.
"""
