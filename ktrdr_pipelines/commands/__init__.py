"""The commands of `ktrdr` that are more than one: a module per group, joined in `cli.py`. Each parses, calls and prints."""
