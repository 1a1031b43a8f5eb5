"""Programs that run in a process of their own and may import PyTorch.

Nothing in the package imports them.
"""
