"""For tests only: N ranks on this machine's CPU (pool) whose cores stay awake (awake), tiny models (tiny), derived
tolerances (tolerances)."""
