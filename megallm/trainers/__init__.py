"""The step, the loop, the losses, and one file a trainer."""
