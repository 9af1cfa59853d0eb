"""A small network, as Flower's first tutorial has it."""
