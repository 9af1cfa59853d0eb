"""The server between the messages and a method: which replies are used."""
