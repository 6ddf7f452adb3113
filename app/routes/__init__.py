"""The HTTP surface, one file a noun."""
