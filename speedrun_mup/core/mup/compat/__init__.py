"""A library with the names and the behaviour of microsoft/mup."""
