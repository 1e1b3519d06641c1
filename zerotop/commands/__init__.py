"""One module per subcommand: `register(subparsers)` adds its arguments, `run(arguments)` gives the exit code.

The modules import what they need inside their functions, so that asking for help loads nothing.
"""
