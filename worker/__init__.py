"""The GPU process, and (in `worker.contract`) what it publishes to the gateway."""
