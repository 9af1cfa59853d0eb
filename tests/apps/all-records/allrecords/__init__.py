"""Every type that a record can hold, there and back."""
