"""The command line: one file for each command, which imports what is heavy only when it runs."""
