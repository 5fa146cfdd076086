"""Everything that training loops share: setup, experience, optimizer steps, run loop."""
