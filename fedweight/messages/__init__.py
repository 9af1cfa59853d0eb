"""The boundary to Flower: what travels between the server and the clients."""
