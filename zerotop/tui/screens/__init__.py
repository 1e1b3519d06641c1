"""Full screens and dialogs: the run, one rank, help, and questions before an action."""
