"""Odd inputs, made by rules and drawn by a seed, tried on every command."""
