"""The floor that everything stands on: vectors, updates, streams, errors, options."""
