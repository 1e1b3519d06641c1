"""What a training step changes: parameters, gradients, optimizer states, counters and the loss scale."""
