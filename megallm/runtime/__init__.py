"""How a process starts (launch), speaks (logging) and ends (guard)."""
