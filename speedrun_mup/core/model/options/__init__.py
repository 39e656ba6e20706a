"""Techniques of later records, one a file, none in force unless a setting asks for it: see speedrun_mup/techniques.py.

A file holds a config with `build`, the module that it builds, what the module declares of its parameters (role, first
values, parameter group, uses), and a function that adds the config to a model's.
"""
