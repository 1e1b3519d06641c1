"""The process and its operating system: forked children, files, temporary folders, cgroup limits. Torch-free."""
