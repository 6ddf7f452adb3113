"""The gateway: HTTP in, HTTP out. Never imports torch."""
