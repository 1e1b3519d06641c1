"""Who updates the parameters: the plain reference, the fused kernels, the offloaded form."""
