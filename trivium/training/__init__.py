"""What every training loop is made of: setup, experience, micro-batches, optimizer, run loop."""
