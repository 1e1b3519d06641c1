"""This process and its system: forked children, open files, temporary folders, cgroup limits. Torch-free."""
