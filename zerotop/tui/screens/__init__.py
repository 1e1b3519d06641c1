"""Full screens and dialogs: the run, one rank, help, and what asks before it acts."""
