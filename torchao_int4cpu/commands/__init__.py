"""The command line: one module a command, each with its options and what it prints."""
