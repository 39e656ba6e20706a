"""The core: architecture, optimizers and muP. Imports nothing from the rest of the package."""
