"""A network with convolutions, and a rate that the server tells."""
