"""Starting a run: check the config and the devices, write the run directory, start the supervisor and torchrun."""
