"""One hub per run: it collects the messages of the ranks, keeps the newest state, records, publishes to the screens
and routes commands."""
