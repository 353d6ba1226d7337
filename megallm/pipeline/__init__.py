"""Pipeline schedules as data, and the runtime that executes any of them."""
