"""Several processes as one run: process groups, consistency checks, failures and shutdown."""
