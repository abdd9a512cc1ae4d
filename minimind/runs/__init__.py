"""Inspect, compare, reproduce and decay finished or running runs."""
