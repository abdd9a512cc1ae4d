"""The command line of minimind, installed as the package `minimind_cli`."""
