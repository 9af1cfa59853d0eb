"""Clients that raise now and then, whose state is as before."""
