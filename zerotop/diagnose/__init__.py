"""Why a run failed, hangs or is slow, from exit codes, logs, stacks, memory and what the hub has heard."""
