"""States in host memory: where they live, how gradients get there, how new parameters come back, who updates them."""
