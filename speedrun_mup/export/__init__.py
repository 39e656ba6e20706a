"""A checkpoint's model in other programs' formats, and back."""
