"""Packets over the network: a server with bounds, its clients, and `offload send`. Nothing is imported here."""
