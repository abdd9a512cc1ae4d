"""Estimates of what a run takes, and measurements of its speed."""
