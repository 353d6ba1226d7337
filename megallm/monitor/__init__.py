"""What a run tells: the metrics file, speed and memory, the console, the loss curve."""
