"""One hub per run: it gathers what ranks say, keeps and records it, tells every screen, and routes commands."""
