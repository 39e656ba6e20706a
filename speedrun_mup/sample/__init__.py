"""Text from a trained model. Keys and values of what was read are kept in core/model/cache.py."""
