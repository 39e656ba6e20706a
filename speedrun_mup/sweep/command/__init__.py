"""A sweep of any command: placeholders in, a loss out."""
