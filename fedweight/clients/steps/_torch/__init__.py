"""What stands on names that PyTorch keeps to itself; each has a test.

Where one is not there any more training gets slower, not wrong.
"""
