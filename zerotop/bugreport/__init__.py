"""`zerotop report`: what is known of a run in one file to attach to a bug report, without secrets."""
