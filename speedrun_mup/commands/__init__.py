"""The commands of `speedrun-mup`: a module each, with `run(argv)`, which returns the exit code."""
