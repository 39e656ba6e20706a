"""speedrun-mup: the modded-nanogpt speedrun recipe, made width-transferable."""

__version__ = "0.1.0"
