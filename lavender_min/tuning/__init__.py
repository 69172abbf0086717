"""Stage 2: one forward with two losses, and the Trainer, checks and folders around it."""
