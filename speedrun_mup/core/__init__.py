"""The physics: architecture, optimizers and muP. Imports nothing from the rest of the package."""
