"""What gateway and worker say to each other through Redis and the picture store. Never imports torch."""
