"""For tests only: N ranks on this machine's CPU (pool), tiny models (tiny), derived tolerances (tolerances)."""
