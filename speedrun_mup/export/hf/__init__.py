"""A run as a folder that Hugging Face's transformers loads without this package. Needs no transformers to write one."""
