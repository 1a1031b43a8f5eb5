"""Programs that run PyTorch, each in a process of its own.

Nothing of the package imports them.
"""
