"""All that the gateway may import of the worker: what both say to each other, and the little that both need.

Never imports torch.
"""
